"""The engine of the household: its state, its commands, and their texts.

The player sees the content of a receptacle only while it stands there and the receptacle is open.
The engine differs from ALFWorld (Shridhar et al., 2021, arXiv:2010.03768) in four ways: rooms and
placements are drawn from this project's tables, lists are sorted by name and number, `look` repeats
the content of the place, and a lamp counts only at the moment of use.
"""

from opd_jax.envs.household.scenes import TaskSpec
from opd_jax.envs.household.tables import LAMPS, LOOK, OBJECT_TABLE, OPENABLE, TREATMENTS, TWO

START = "You are in the middle of a room. Looking quickly around you, you see %s."
ARRIVE = "You arrive at %s. "
FACING = "You are facing the %s. "
CLOSED = "The %s is closed."
OPEN = "The %s is open. In it, you see %s."
ON = "On the %s, you see %s."
NOTHING_SEEN = "nothing"
OPENED = "You open the %s. "
SHUT = "You close the %s."
TOOK = "You pick up the %s from the %s."
MOVED = "You move the %s to the %s."
TREATED = "You %s the %s using the %s."
SWITCHED_ON = "You turn on the %s."
CARRYING = "You are carrying: a %s."
EMPTY_HANDED = "You are not carrying anything."
ORDINARY = "There's nothing special about %s."
STATE = "This is a %s %s."
NOTHING = "Nothing happens."
# Every fixed text of the world, for the tokenizer.
PHRASES = (
    START, ARRIVE, FACING, CLOSED, OPEN, ON,
    NOTHING_SEEN, OPENED, SHUT, TOOK, MOVED, TREATED, SWITCHED_ON, CARRYING, EMPTY_HANDED,
    ORDINARY, STATE, NOTHING, ", and a", "hot and clean", "cool and clean",
)  # fmt: skip
COMMANDS = (
    "go to %s", "take %s from %s", "move %s to %s", "put %s in/on %s", "put %s in %s",
    "put %s on %s", "open %s", "close %s", "clean %s with %s", "heat %s with %s",
    "cool %s with %s", "use %s", "examine %s", "look", "inventory",
)  # fmt: skip

# Verb -> (state it gives, receptacle type that does it).
_TOOLS = {verb: (state, tool) for verb, state, tool in TREATMENTS.values()}


def listing(names: list[str]) -> str:
    """`a x 1`, `a x 1, and a y 1`, `a x 1, a y 1, and a z 1`; `nothing` for no names."""
    if not names:
        return NOTHING_SEEN
    if len(names) == 1:
        return "a " + names[0]
    return "a " + ", a ".join(names[:-1]) + ", and a " + names[-1]


class Room:
    """What never changes in an episode; places and objects are numbered from 0 in listed order.

    Attributes:
      spec: the task.
      places, place_types, openable: name and type of each receptacle; whether it can be opened.
      objects, object_types: name and type of each object.
      wanted: objects of the goal's type.
      targets: receptacles of the goal's type.
      state: `clean`, `hot` or `cool`; "" if the goal asks for none.
      tools: receptacles that give this state.
      lamps: lamps of the goal's type.
      go: for each receptacle, the command that leads there.
    """

    def __init__(self, spec: TaskSpec):
        self.spec = spec
        self.place_types = tuple(kind for kind, _ in spec.places)
        self.places = tuple(f"{kind} {number}" for kind, number in spec.places)
        self.openable = tuple(kind in OPENABLE for kind in self.place_types)
        self.object_types = tuple(kind for kind, _, _ in spec.objects)
        self.objects = tuple(f"{kind} {number}" for kind, number, _ in spec.objects)
        self.is_lamp = tuple(kind in LAMPS for kind in self.object_types)
        self.place_index = {name: i for i, name in enumerate(self.places)}
        self.object_index = {name: i for i, name in enumerate(self.objects)}
        _, self.state, tool = TREATMENTS.get(spec.type, ("", "", ""))
        self.wanted = _of_type(self.object_types, spec.object)
        self.lamps = _of_type(self.object_types, spec.lamp)
        self.targets = _of_type(self.place_types, spec.target)
        self.tools = _of_type(self.place_types, tool)
        self.go = tuple("go to " + name for name in self.places)
        self.start = START % listing(list(self.places))


def _of_type(types: tuple[str, ...], wanted: str) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(types) if kind == wanted)


class World:
    """The state of one episode, and the commands that change it.

    Attributes:
      room: the fixed part.
      at: the receptacle where the player stands; -1 in the middle of the room.
      hand: the object in hand; -1 for none.
      where: for each object, the receptacle that holds it; -1 in hand.
      content: for each receptacle, its objects in order.
      is_open: for each receptacle; True if it cannot be closed.
      heat: for each object "", `hot` or `cool`.
      clean: for each object.
      solved: the goal has been reached.
    """

    __slots__ = (
        "_content_texts", "at", "clean", "content", "hand", "heat", "is_open", "room", "solved",
        "where",
    )  # fmt: skip

    def __init__(self, spec: TaskSpec):
        self.room = Room(spec)
        self.at = self.hand = -1
        self.where = [place for _, _, place in spec.objects]
        self.content: list[list[int]] = [[] for _ in spec.places]
        for item, place in enumerate(self.where):
            self.content[place].append(item)
        self.is_open = [not openable for openable in self.room.openable]
        self.heat = [""] * len(self.where)
        self.clean = [False] * len(self.where)
        self.solved = False
        self._content_texts: list[str] = [""] * len(spec.places)

    def copy(self) -> "World":
        """A copy; changes to it do not change this state."""
        other = World.__new__(World)
        other.room, other.at, other.hand = self.room, self.at, self.hand
        other.where = self.where.copy()
        other.content = [items.copy() for items in self.content]
        other.is_open = self.is_open.copy()
        other.heat, other.clean = self.heat.copy(), self.clean.copy()
        other.solved = self.solved
        other._content_texts = self._content_texts.copy()
        return other

    def has_state(self, item: int, state: str) -> bool:
        """Whether `item` is `clean`, `hot` or `cool`."""
        return self.clean[item] if state == "clean" else self.heat[item] == state

    def act(self, command: str) -> str:
        """Carry out a command and return the text; `Nothing happens.` if it is not possible."""
        words = command.lower().rstrip(" .\t").split()
        handler = _HANDLERS.get(words[0]) if words else None
        return handler(self, words) if handler else NOTHING

    def admissible(self) -> tuple[str, ...]:
        """Commands that are possible now: things at hand, then going, then looking."""
        room, at, hand = self.room, self.at, self.hand
        held = room.objects[hand] if hand >= 0 else ""
        if at < 0:
            looking = ["look", "inventory"]
            if held:
                looking.insert(0, "examine " + held)
            return (*room.go, *looking)
        place = room.places[at]
        commands: list[str] = []
        visible = [room.objects[item] for item in self.content[at]] if self.is_open[at] else []
        if self.is_open[at]:
            commands += self._moves(place, held, visible)
        if room.openable[at]:
            commands.append(("close " if self.is_open[at] else "open ") + place)
        if held:
            abilities = OBJECT_TABLE[room.object_types[hand]].abilities
            for verb, (_, tool) in _TOOLS.items():
                if tool == room.place_types[at] and verb in abilities:
                    commands.append(f"{verb} {held} with {place}")
        if self.is_open[at]:
            for item in self.content[at]:
                if room.is_lamp[item]:
                    commands.append("use " + room.objects[item])
        commands += room.go[:at]
        commands += room.go[at + 1 :]
        commands.append("examine " + place)
        commands += ["examine " + name for name in visible]
        if held:
            commands.append("examine " + held)
        commands += ("look", "inventory")
        return tuple(commands)

    def _moves(self, place: str, held: str, visible: list[str]) -> list[str]:
        if held:
            return [f"move {held} to {place}"]
        lamp = self.room.is_lamp
        return [
            f"take {name} from {place}"
            for item, name in zip(self.content[self.at], visible, strict=True)
            if not lamp[item]
        ]

    def _content_text(self, place: int) -> str:
        text = self._content_texts[place]
        if not text:
            room, name = self.room, self.room.places[place]
            if not self.is_open[place]:
                text = CLOSED % name
            else:
                seen = listing([room.objects[item] for item in self.content[place]])
                text = (OPEN if room.openable[place] else ON) % (name, seen)
            self._content_texts[place] = text
        return text

    def _place_named(self, first: str, second: str) -> int:
        return self.room.place_index.get(f"{first} {second}", -1)

    def _object_named(self, first: str, second: str) -> int:
        return self.room.object_index.get(f"{first} {second}", -1)

    def _here(self, item: int) -> bool:
        """Whether `item` lies in sight at the current place."""
        return self.at >= 0 and self.where[item] == self.at and self.is_open[self.at]

    def _go(self, words: list[str]) -> str:
        if len(words) != 4 or words[1] != "to":
            return NOTHING
        place = self._place_named(words[2], words[3])
        if place < 0 or place == self.at:
            return NOTHING
        self.at = place
        return ARRIVE % self.room.places[place] + self._content_text(place)

    def _take(self, words: list[str]) -> str:
        if len(words) != 6 or words[3] != "from" or self.hand >= 0:
            return NOTHING
        item, place = self._object_named(*words[1:3]), self._place_named(*words[4:6])
        if item < 0 or place != self.at or not self._here(item) or self.room.is_lamp[item]:
            return NOTHING
        self.hand = item
        self.where[item] = -1
        self.content[place].remove(item)
        self._content_texts[place] = ""
        return TOOK % (self.room.objects[item], self.room.places[place])

    def _move(self, words: list[str]) -> str:
        links = ("to",) if words[0] == "move" else ("in/on", "in", "on")
        if len(words) != 6 or words[3] not in links or self.hand < 0 or self.at < 0:
            return NOTHING
        item, place = self._object_named(*words[1:3]), self._place_named(*words[4:6])
        if item != self.hand or place != self.at or not self.is_open[place]:
            return NOTHING
        self.hand = -1
        self.where[item] = place
        self.content[place].append(item)
        self.content[place].sort()
        self._content_texts[place] = ""
        self._check_placed(item, place)
        return MOVED % (self.room.objects[item], self.room.places[place])

    def _check_placed(self, item: int, place: int) -> None:
        """Set `solved` for goals that end with placing an object, here `item`."""
        room = self.room
        if item not in room.wanted or place not in room.targets:
            return
        if room.spec.type == TWO:
            self.solved = sum(self.where[other] == place for other in room.wanted) >= 2
        else:
            self.solved = not room.state or self.has_state(item, room.state)

    def _open(self, words: list[str]) -> str:
        place = self._openable_here(words)
        if place < 0 or self.is_open[place]:
            return NOTHING
        self.is_open[place] = True
        self._content_texts[place] = ""
        return OPENED % self.room.places[place] + self._content_text(place)

    def _close(self, words: list[str]) -> str:
        place = self._openable_here(words)
        if place < 0 or not self.is_open[place]:
            return NOTHING
        self.is_open[place] = False
        self._content_texts[place] = ""
        return SHUT % self.room.places[place]

    def _openable_here(self, words: list[str]) -> int:
        place = self._place_named(*words[1:]) if len(words) == 3 else -1
        return place if place >= 0 and place == self.at and self.room.openable[place] else -1

    def _treat(self, words: list[str]) -> str:
        if len(words) != 6 or words[3] != "with" or self.hand < 0 or self.at < 0:
            return NOTHING
        room, verb = self.room, words[0]
        item, place = self._object_named(*words[1:3]), self._place_named(*words[4:6])
        state, tool = _TOOLS[verb]
        if item != self.hand or place != self.at or room.place_types[place] != tool:
            return NOTHING
        if verb not in OBJECT_TABLE[room.object_types[item]].abilities:
            return NOTHING
        if state == "clean":
            self.clean[item] = True
        else:
            self.heat[item] = state  # heating undoes cooling, and cooling undoes heating
        return TREATED % (verb, room.objects[item], room.places[place])

    def _use(self, words: list[str]) -> str:
        item = self._object_named(*words[1:]) if len(words) == 3 else -1
        if item < 0 or not self.room.is_lamp[item] or not self._here(item):
            return NOTHING
        room = self.room
        if room.spec.type == LOOK and item in room.lamps and self.hand in room.wanted:
            self.solved = True
        return SWITCHED_ON % room.objects[item]

    def _examine(self, words: list[str]) -> str:
        if len(words) != 3:
            return NOTHING
        place = self._place_named(*words[1:])
        if place >= 0:
            return self._content_text(place) if place == self.at else NOTHING
        item = self._object_named(*words[1:])
        if item < 0 or not (item == self.hand or self._here(item)):
            return NOTHING
        states = [self.heat[item]] if self.heat[item] else []
        if self.clean[item]:
            states.append("clean")
        if not states:
            return ORDINARY % self.room.objects[item]
        return STATE % (" and ".join(states), self.room.object_types[item])

    def _look(self, words: list[str]) -> str:
        if len(words) != 1:
            return NOTHING
        if self.at < 0:
            return self.room.start
        return FACING % self.room.places[self.at] + self._content_text(self.at)

    def _inventory(self, words: list[str]) -> str:
        if len(words) != 1:
            return NOTHING
        return CARRYING % self.room.objects[self.hand] if self.hand >= 0 else EMPTY_HANDED


_HANDLERS = {
    "go": World._go,
    "take": World._take,
    "move": World._move,
    "put": World._move,
    "open": World._open,
    "close": World._close,
    "clean": World._treat,
    "heat": World._treat,
    "cool": World._treat,
    "use": World._use,
    "examine": World._examine,
    "look": World._look,
    "inventory": World._inventory,
}
