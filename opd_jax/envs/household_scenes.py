"""Scenes and tasks of the household world: tables, and pure functions that draw from them.

A scene says which receptacles stand in a room; it depends on the room kind, the scene number and
the size. A task adds a goal and the objects with their places; it depends on the split, the index
and the size. Both draw from a generator seeded by SHA-256 of a text such as
`household/1/large/train/17`, and use its `random()` only, which Python keeps stable between
versions; nothing depends on hash order.

The task types, room kinds and vocabulary follow ALFWorld (Shridhar et al., 2021,
arXiv:2010.03768); the tables and the placements are this project's own, so results here are not
ALFWorld results.
"""

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Changing a table or the order of the draws changes every task: raise VERSION with it.
VERSION = 1

SIZES = ("small", "medium", "large")
SPLIT_SIZES = {"train": 1_000_000, "valid_seen": 1_000, "valid_unseen": 1_000}
TRAIN_SCENES = 100
UNSEEN_SCENES = 25

SIMPLE = "pick_and_place_simple"
LOOK = "look_at_obj_in_light"
CLEAN = "pick_clean_then_place_in_recep"
HEAT = "pick_heat_then_place_in_recep"
COOL = "pick_cool_then_place_in_recep"
TWO = "pick_two_obj_and_place"

# Task type -> the room kinds that can host it.
TASK_ROOMS = {
    SIMPLE: ("kitchen", "livingroom", "bedroom", "bathroom"),
    LOOK: ("livingroom", "bedroom"),
    CLEAN: ("kitchen", "bathroom"),
    HEAT: ("kitchen",),
    COOL: ("kitchen",),
    TWO: ("kitchen", "livingroom", "bedroom", "bathroom"),
}
TASK_TYPES = tuple(TASK_ROOMS)
# Task type -> (verb, state it gives, receptacle type that does it).
TREATMENTS = {
    CLEAN: ("clean", "clean", "sinkbasin"),
    HEAT: ("heat", "hot", "microwave"),
    COOL: ("cool", "cool", "fridge"),
}
GOALS = {
    SIMPLE: ("put a {object} {prep} {place}.", "put some {object} {prep} {place}."),
    LOOK: ("look at {object} under the {lamp}.", "examine the {object} with the {lamp}."),
    CLEAN: (
        "put a clean {object} {prep} {place}.",
        "clean some {object} and put it {prep} {place}.",
    ),
    HEAT: ("put a hot {object} {prep} {place}.", "heat some {object} and put it {prep} {place}."),
    COOL: ("put a cool {object} {prep} {place}.", "cool some {object} and put it {prep} {place}."),
    TWO: ("put two {object} {prep} {place}.", "find two {object} and put them {prep} {place}."),
}

OPENABLE = ("cabinet", "drawer", "fridge", "laundryhamper", "microwave", "safe")
# Receptacle types one puts things "in"; "on" for all others.
INSIDE = (*OPENABLE, "bathtubbasin", "garbagecan", "sinkbasin")

# Room kind -> receptacle type -> (how many at least, weight of one more, and how many at most in a
# small, medium and large room).
ROOMS: Mapping[str, Mapping[str, tuple[int, float, tuple[int, int, int]]]] = {
    "kitchen": {
        "cabinet": (0, 6.0, (2, 3, 7)),
        "cart": (0, 1.0, (1, 1, 1)),
        "coffeemachine": (0, 1.0, (1, 1, 1)),
        "countertop": (1, 2.0, (2, 2, 3)),
        "diningtable": (0, 2.0, (1, 1, 2)),
        "drawer": (0, 5.0, (2, 3, 6)),
        "fridge": (1, 0.0, (1, 1, 1)),
        "garbagecan": (0, 2.0, (1, 1, 1)),
        "microwave": (1, 0.0, (1, 1, 1)),
        "shelf": (0, 2.0, (1, 2, 4)),
        "sidetable": (0, 1.0, (1, 1, 1)),
        "sinkbasin": (1, 0.0, (1, 1, 1)),
        "stoveburner": (0, 3.0, (1, 2, 4)),
        "toaster": (0, 1.0, (1, 1, 1)),
    },
    "livingroom": {
        "armchair": (0, 2.0, (1, 2, 3)),
        "cabinet": (0, 2.0, (1, 2, 4)),
        "cart": (0, 0.5, (1, 1, 1)),
        "coffeetable": (0, 2.0, (1, 1, 2)),
        "desk": (0, 1.0, (1, 1, 1)),
        "diningtable": (0, 1.5, (1, 1, 1)),
        "drawer": (0, 3.0, (1, 2, 6)),
        "dresser": (0, 1.0, (1, 1, 1)),
        "garbagecan": (0, 1.0, (1, 1, 1)),
        "ottoman": (0, 0.5, (1, 1, 1)),
        "safe": (0, 0.5, (1, 1, 1)),
        "shelf": (0, 2.0, (2, 2, 4)),
        "sidetable": (1, 1.5, (1, 2, 3)),
        "sofa": (1, 0.5, (1, 1, 2)),
        "tvstand": (0, 1.5, (1, 1, 1)),
    },
    "bedroom": {
        "armchair": (0, 1.0, (1, 1, 2)),
        "bed": (1, 0.5, (1, 1, 2)),
        "cabinet": (0, 1.5, (1, 2, 3)),
        "desk": (1, 0.5, (1, 1, 2)),
        "drawer": (0, 4.0, (2, 3, 6)),
        "dresser": (0, 2.0, (1, 1, 2)),
        "garbagecan": (0, 1.0, (1, 1, 1)),
        "laundryhamper": (0, 1.0, (1, 1, 1)),
        "safe": (0, 1.0, (1, 1, 1)),
        "shelf": (0, 3.0, (2, 3, 4)),
        "sidetable": (0, 2.0, (1, 2, 2)),
        "sofa": (0, 0.5, (1, 1, 1)),
    },
    "bathroom": {
        "bathtubbasin": (0, 1.0, (1, 1, 1)),
        "cabinet": (0, 3.0, (2, 3, 5)),
        "cart": (0, 0.5, (1, 1, 1)),
        "countertop": (0, 2.0, (1, 1, 2)),
        "drawer": (0, 2.0, (2, 2, 4)),
        "garbagecan": (0, 1.5, (1, 1, 1)),
        "handtowelholder": (0, 1.5, (1, 2, 2)),
        "laundryhamper": (0, 0.5, (1, 1, 1)),
        "shelf": (0, 1.5, (1, 2, 3)),
        "sidetable": (0, 0.5, (1, 1, 1)),
        "sinkbasin": (1, 0.5, (1, 2, 2)),
        "toilet": (1, 0.0, (1, 1, 1)),
        "toiletpaperhanger": (0, 1.0, (1, 1, 2)),
        "towelholder": (0, 1.5, (1, 2, 2)),
    },
}
ROOM_KINDS = tuple(ROOMS)
# Receptacles in a room, least and most; kitchens are the largest rooms, as in ALFWorld.
ROOM_SIZES = {"small": (5, 7), "medium": (9, 13), "large": (13, 20)}
LARGE_KITCHEN = (22, 28)
# Distractor objects in a room, least and most.
CLUTTER = {"small": (3, 6), "medium": (7, 12), "large": (12, 25)}
MAX_COPIES = 3  # objects of one type in a room, at most

# Places of a room that make a sensible goal for any object found there.
SURFACES = {
    "kitchen": ("countertop", "diningtable", "sidetable"),
    "livingroom": ("armchair", "coffeetable", "diningtable", "sidetable", "sofa"),
    "bedroom": ("bed", "desk", "dresser", "sidetable"),
    "bathroom": ("countertop", "garbagecan", "toilet"),
}


@dataclass(frozen=True)
class ObjectKind:
    """One row of the object table.

    Attributes:
      rooms: room kinds in which it is found.
      abilities: of `clean`, `heat` and `cool`, what can be done to it.
      prior: (receptacle type, weight of each receptacle of that type), heaviest first; of two
        with the same weight the one that need not be opened.
    """

    rooms: tuple[str, ...]
    abilities: tuple[str, ...]
    prior: tuple[tuple[str, int], ...]


def _row(rooms: str, abilities: str, prior: str) -> ObjectKind:
    pairs = [entry.split() for entry in prior.split(",")]
    return ObjectKind(
        rooms=tuple(rooms.split()),
        abilities=tuple(abilities.split()),
        prior=tuple((place, int(weight)) for place, weight in pairs),
    )


# The order of the receptacle types is public knowledge: the expert player searches by it, and as
# weights are those of a single receptacle, likeliest first is also the best order.
OBJECT_TABLE: Mapping[str, ObjectKind] = {
    # Food.
    "apple": _row(
        "kitchen",
        "clean heat cool",
        "fridge 4, diningtable 3, countertop 3, sinkbasin 2, garbagecan 2, sidetable 2",
    ),
    "bread": _row(
        "kitchen", "heat cool", "countertop 4, diningtable 3, fridge 3, toaster 2, cabinet 2"
    ),
    "egg": _row(
        "kitchen", "clean heat cool", "fridge 4, countertop 3, sinkbasin 2, garbagecan 2, shelf 2"
    ),
    "lettuce": _row(
        "kitchen",
        "clean heat cool",
        "fridge 4, diningtable 3, countertop 3, sinkbasin 2, garbagecan 2",
    ),
    "potato": _row(
        "kitchen",
        "clean heat cool",
        "sinkbasin 3, countertop 3, fridge 3, garbagecan 2, cabinet 2",
    ),
    "tomato": _row(
        "kitchen",
        "clean heat cool",
        "diningtable 3, countertop 3, fridge 3, sinkbasin 2, garbagecan 2, shelf 2",
    ),
    # Kitchenware.
    "bowl": _row(
        "kitchen livingroom bedroom",
        "clean heat cool",
        "desk 4, diningtable 3, coffeetable 3, dresser 3, cabinet 3, shelf 2, fridge 2",
    ),
    "butterknife": _row("kitchen", "clean", "sinkbasin 3, diningtable 3, countertop 3, drawer 3"),
    "cup": _row(
        "kitchen",
        "clean heat cool",
        "sinkbasin 3, countertop 3, cabinet 3, diningtable 2, coffeemachine 1",
    ),
    "dishsponge": _row("kitchen", "clean", "sinkbasin 4, countertop 3, drawer 3, cart 2"),
    "fork": _row("kitchen", "clean", "diningtable 3, countertop 3, drawer 3, sinkbasin 2"),
    "glassbottle": _row(
        "kitchen", "", "garbagecan 3, countertop 3, cabinet 3, diningtable 2, shelf 2"
    ),
    "kettle": _row("kitchen", "clean", "stoveburner 3, countertop 3, cabinet 3, sinkbasin 2"),
    "knife": _row("kitchen", "clean", "countertop 4, diningtable 3, drawer 3, sinkbasin 2"),
    "ladle": _row("kitchen", "clean", "sinkbasin 3, countertop 3, drawer 3, stoveburner 1"),
    "mug": _row(
        "kitchen bedroom",
        "clean heat cool",
        "desk 4, coffeemachine 3, dresser 3, countertop 3, cabinet 3, sinkbasin 2, shelf 2",
    ),
    "pan": _row(
        "kitchen", "clean cool", "stoveburner 3, countertop 3, cabinet 3, sinkbasin 2, fridge 1"
    ),
    "papertowelroll": _row(
        "kitchen", "", "countertop 4, drawer 3, diningtable 2, garbagecan 2, sidetable 2"
    ),
    "peppershaker": _row("kitchen", "", "diningtable 3, countertop 3, drawer 3, shelf 2"),
    "plate": _row(
        "kitchen", "clean heat cool", "countertop 3, cabinet 3, diningtable 2, sinkbasin 2"
    ),
    "pot": _row(
        "kitchen", "clean cool", "stoveburner 3, countertop 3, sinkbasin 2, fridge 2, cabinet 2"
    ),
    "saltshaker": _row("kitchen", "", "diningtable 3, countertop 3, cabinet 3, shelf 2"),
    "spatula": _row("kitchen", "clean", "countertop 3, drawer 3, sinkbasin 2, stoveburner 2"),
    "spoon": _row("kitchen", "clean", "sinkbasin 3, diningtable 3, countertop 3, drawer 3"),
    "winebottle": _row(
        "kitchen", "", "countertop 3, fridge 3, cabinet 3, garbagecan 2, diningtable 2"
    ),
    # Living room and bedroom.
    "alarmclock": _row("bedroom", "", "desk 3, sidetable 3, dresser 3, shelf 2, drawer 2, bed 1"),
    "baseballbat": _row("bedroom", "", "bed 4, armchair 3, sofa 3, safe 2, cabinet 2"),
    "basketball": _row("bedroom", "", "bed 3, armchair 3, dresser 3, laundryhamper 2, cabinet 2"),
    "book": _row(
        "livingroom bedroom",
        "",
        "desk 3, bed 3, coffeetable 3, sofa 3, diningtable 2, dresser 2, shelf 2, drawer 2",
    ),
    "box": _row(
        "livingroom",
        "",
        "coffeetable 3, diningtable 3, armchair 3, sofa 3, cabinet 3, ottoman 2, dresser 2",
    ),
    "cd": _row("bedroom", "", "desk 3, safe 3, drawer 3, garbagecan 2, shelf 2"),
    "cellphone": _row(
        "livingroom bedroom",
        "",
        "bed 3, desk 3, coffeetable 3, sofa 3, drawer 3, dresser 2, armchair 2, safe 2",
    ),
    "creditcard": _row(
        "livingroom bedroom",
        "",
        "desk 3, coffeetable 3, sidetable 3, drawer 3, dresser 2, armchair 2, shelf 2",
    ),
    "keychain": _row(
        "livingroom bedroom", "", "safe 4, sidetable 3, sofa 3, drawer 3, desk 2, ottoman 1"
    ),
    "laptop": _row(
        "livingroom bedroom",
        "",
        "bed 3, desk 3, sofa 3, coffeetable 3, diningtable 2, dresser 2, armchair 2, cabinet 2",
    ),
    "newspaper": _row(
        "livingroom", "", "sofa 3, coffeetable 3, armchair 3, garbagecan 2, drawer 2, cart 1"
    ),
    "pen": _row(
        "livingroom bedroom",
        "",
        "desk 3, sidetable 3, drawer 3, dresser 2, garbagecan 2, coffeetable 2, shelf 2",
    ),
    "pencil": _row(
        "livingroom bedroom",
        "",
        "desk 3, drawer 3, coffeetable 2, garbagecan 2, sidetable 2, shelf 2",
    ),
    "pillow": _row(
        "livingroom bedroom", "", "bed 4, sofa 3, armchair 3, ottoman 2, laundryhamper 2, cabinet 2"
    ),
    "remotecontrol": _row(
        "livingroom", "", "tvstand 3, sofa 3, coffeetable 3, armchair 3, drawer 3, ottoman 1"
    ),
    "statue": _row(
        "livingroom", "", "dresser 3, coffeetable 3, sidetable 3, tvstand 2, shelf 2, cabinet 2"
    ),
    "teddybear": _row("bedroom", "", "bed 4, sofa 3, laundryhamper 3, armchair 2, cabinet 2"),
    "tennisracket": _row("bedroom", "", "bed 3, dresser 3, desk 2, safe 2, cabinet 2"),
    "vase": _row(
        "livingroom", "", "diningtable 3, dresser 3, sidetable 3, coffeetable 2, shelf 2, cabinet 2"
    ),
    "watch": _row(
        "livingroom bedroom",
        "",
        "safe 4, dresser 3, sidetable 3, drawer 3, coffeetable 2, shelf 2",
    ),
    # Bathroom.
    "candle": _row(
        "livingroom bathroom",
        "",
        "toilet 3, coffeetable 3, countertop 3, bathtubbasin 2, shelf 2, drawer 2",
    ),
    "cloth": _row(
        "bathroom", "clean", "bathtubbasin 3, countertop 3, laundryhamper 3, cabinet 3, cart 1"
    ),
    "handtowel": _row(
        "bathroom", "", "handtowelholder 4, countertop 3, sinkbasin 2, laundryhamper 2, cabinet 2"
    ),
    "plunger": _row("bathroom", "", "toilet 3, cabinet 3, bathtubbasin 2, garbagecan 1"),
    "scrubbrush": _row("bathroom", "", "toilet 3, countertop 3, cabinet 3, bathtubbasin 2"),
    "soapbar": _row(
        "bathroom", "clean", "bathtubbasin 3, sinkbasin 3, countertop 3, drawer 3, toilet 2"
    ),
    "soapbottle": _row(
        "kitchen bathroom",
        "",
        "sinkbasin 3, countertop 3, cabinet 3, toilet 2, garbagecan 2, shelf 2",
    ),
    "spraybottle": _row("bathroom", "", "countertop 3, cabinet 3, toilet 2, garbagecan 2, shelf 2"),
    "tissuebox": _row(
        "livingroom bathroom",
        "",
        "toilet 3, coffeetable 3, countertop 3, sidetable 3, cabinet 3, cart 2, shelf 2",
    ),
    "toiletpaper": _row(
        "bathroom", "", "toilet 3, toiletpaperhanger 3, drawer 3, shelf 2, garbagecan 1"
    ),
    "towel": _row(
        "bathroom", "", "towelholder 4, laundryhamper 3, bathtubbasin 2, shelf 2, cabinet 2"
    ),
    # Lamps stay where they are and are only switched on.
    "desklamp": _row("bedroom", "", "desk 3, dresser 3, sidetable 3, shelf 2"),
    "floorlamp": _row(
        "livingroom", "", "sidetable 3, armchair 3, sofa 3, coffeetable 2, desk 2, dresser 2"
    ),
}
LAMPS = ("desklamp", "floorlamp")

RECEPTACLES = tuple(sorted({name for room in ROOMS.values() for name in room}))
OBJECTS = tuple(sorted(OBJECT_TABLE))
# The highest number that can follow a receptacle's or an object's name.
MAX_RECEPTACLE_NUMBER = max(caps[-1] for room in ROOMS.values() for _, _, caps in room.values())
MAX_OBJECT_NUMBER = MAX_COPIES


def search_order(object_type: str) -> tuple[str, ...]:
    """Receptacle types in which `object_type` can be found, likeliest first."""
    return tuple(place for place, _ in OBJECT_TABLE[object_type].prior)


def preposition(receptacle_type: str) -> str:
    """`in` or `on`, whichever goes with the receptacle type."""
    return "in" if receptacle_type in INSIDE else "on"


@dataclass(frozen=True)
class TaskSpec:
    """Everything hidden and visible about one task.

    Attributes:
      id: `household/<size>/<split>/<index>`.
      type: one of `TASK_TYPES`.
      goal: the instruction, ending in a full stop.
      room: room kind.
      scene: scene number; numbers above `TRAIN_SCENES` belong to `valid_unseen`.
      object: the object type that the goal asks for.
      target: the receptacle type of the goal; "" for `look_at_obj_in_light`.
      lamp: the lamp type of the goal; "" for all other types.
      places: (type, number) of the receptacles in listed order.
      objects: (type, number, index into `places`) in order of type and number.
    """

    id: str
    type: str
    goal: str
    room: str
    scene: int
    object: str
    target: str
    lamp: str
    places: tuple[tuple[str, int], ...]
    objects: tuple[tuple[str, int, int], ...]


class Draw:
    """Draws from a generator seeded by a text; the same on every machine and Python version."""

    def __init__(self, seed: str):
        digest = hashlib.sha256(seed.encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def below(self, bound: int) -> int:
        """A uniform integer in `[0, bound)`."""
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """A uniform integer in `[low, high]`."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence):
        """A uniform item."""
        return items[self.below(len(items))]

    def weighted(self, pairs: Sequence[tuple[str, float]]) -> str:
        """The first member of a pair, with probability in proportion to the second."""
        point = self._random() * sum(weight for _, weight in pairs)
        for name, weight in pairs:
            point -= weight
            if point < 0:
                return name
        return pairs[-1][0]

    def shuffled(self, items: Sequence) -> list:
        """A uniform permutation."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


def _held_out(counts: tuple[tuple[str, int], ...]) -> bool:
    """Whether a receptacle multiset is reserved for scenes that are never trained on."""
    text = ",".join(f"{name}:{count}" for name, count in counts)
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def _draw_counts(draw: Draw, room: str, size: str) -> tuple[tuple[str, int], ...]:
    table, column = ROOMS[room], SIZES.index(size)
    bounds = LARGE_KITCHEN if (room, size) == ("kitchen", "large") else ROOM_SIZES[size]
    total = draw.between(*bounds)
    counts = {name: least for name, (least, _, _) in table.items()}
    while sum(counts.values()) < total:
        open_types = [
            (name, weight)
            for name, (_, weight, most) in table.items()
            if weight and counts[name] < most[column]
        ]
        counts[draw.weighted(open_types)] += 1
    return tuple((name, count) for name, count in sorted(counts.items()) if count)


@functools.cache
def scene(room: str, number: int, size: str) -> tuple[tuple[str, int], ...]:
    """Receptacle types of a scene, in order of type, each with its count.

    Scenes up to `TRAIN_SCENES` never have the receptacle multiset of a scene above it: each
    multiset belongs to one side by its digest, and draws from the other side are rejected.

    Args:
      room: one of `ROOM_KINDS`.
      number: 1 to `TRAIN_SCENES + UNSEEN_SCENES`.
      size: one of `SIZES`.

    Raises:
      ValueError: if the size, room or number is unknown.
    """
    check_size(size)
    if room not in ROOMS:
        raise ValueError(f"`room` must be one of {', '.join(ROOM_KINDS)}; got {room!r}.")
    if not 1 <= number <= TRAIN_SCENES + UNSEEN_SCENES:
        raise ValueError(
            f"`number` must be from 1 to {TRAIN_SCENES + UNSEEN_SCENES}; got {number}."
        )
    draw = Draw(f"household/{VERSION}/scene/{size}/{room}/{number}")
    while True:
        counts = _draw_counts(draw, room, size)
        if _held_out(counts) == (number > TRAIN_SCENES):
            return counts


def check_size(size: str) -> None:
    """ValueError unless `size` is one of `SIZES`."""
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}; got {size!r}.")


def split_size(split: str) -> int:
    """Number of tasks in `split`; ValueError naming the known splits if there is none."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"`split` must be one of {', '.join(SPLIT_SIZES)}; got {split!r}.")
    return SPLIT_SIZES[split]


def _task_type(split: str, index: int, size: str) -> str:
    # Each block of six consecutive tasks holds each type once, in an order of its own, so that
    # neither a prefix nor a stride of a split is lopsided.
    block, place = divmod(index, len(TASK_TYPES))
    draw = Draw(f"household/{VERSION}/{size}/{split}/block/{block}")
    return draw.shuffled(TASK_TYPES)[place]


@functools.cache
def _choices(
    task_type: str, room: str, present: tuple[str, ...]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Objects that can serve a task in a room, each with its possible target types."""
    verb, _, tool = TREATMENTS.get(task_type, ("", "", ""))
    choices = []
    for name, row in OBJECT_TABLE.items():
        homes = [place for place in search_order(name) if place in present]
        if room not in row.rooms or name in LAMPS or not homes:
            continue
        if verb and verb not in row.abilities:
            continue
        targets = {place for place in (*homes, *SURFACES[room]) if place in present}
        targets.discard(tool)
        if task_type in (SIMPLE, TWO):
            # The objects must have somewhere else to be at the start.
            targets = {target for target in targets if any(home != target for home in homes)}
        if task_type == LOOK:
            targets = {""}
        if targets:
            choices.append((name, tuple(sorted(targets))))
    return tuple(choices)


def _place(draw: Draw, name: str, counts: Mapping[str, int], avoid: str) -> tuple[str, int]:
    """Receptacle type and number for one object, never of the type `avoid`."""
    homes = [
        (place, weight * counts[place])
        for place, weight in OBJECT_TABLE[name].prior
        if place in counts and place != avoid
    ]
    place = draw.weighted(homes)
    return place, draw.between(1, counts[place])


def _clutter(
    draw: Draw, room: str, wanted: str, lamp: str, counts: Mapping[str, int], size: str
) -> list[str]:
    """Types of the distractor objects."""
    kinds = [
        name
        for name, row in OBJECT_TABLE.items()
        if room in row.rooms and name not in (wanted, *LAMPS)
        if any(place in counts for place in search_order(name))
    ]
    chosen: list[str] = []
    for _ in range(min(draw.between(*CLUTTER[size]), MAX_COPIES * len(kinds))):
        name = draw.choice([kind for kind in kinds if chosen.count(kind) < MAX_COPIES])
        chosen.append(name)
    return [*chosen, lamp] if lamp else chosen


def _goal(draw: Draw, task_type: str, wanted: str, target: str, lamp: str) -> str:
    template = draw.choice(GOALS[task_type])
    return template.format(object=wanted, place=target, prep=preposition(target), lamp=lamp)


def _room_lamp(room: str) -> str:
    return next((lamp for lamp in LAMPS if room in OBJECT_TABLE[lamp].rooms), "")


def task(split: str, index: int, size: str) -> TaskSpec:
    """Draw task `index` of `split`: a pure function of its arguments.

    Types are exactly balanced in every block of six tasks; the room kind is uniform over those
    that can host the type. The goal never holds at the start: for `pick_and_place_simple` and
    `pick_two_obj_and_place` no wanted object starts in a receptacle of the target type.

    Args:
      split: one of `SPLIT_SIZES`; `valid_unseen` uses scenes that the others never use.
      index: from 0 to the split's size less one.
      size: one of `SIZES`.

    Raises:
      ValueError: if the split or size is unknown or the index is out of range.
    """
    check_size(size)
    if not 0 <= index < split_size(split):
        raise ValueError(
            f"`index` must be from 0 to {split_size(split) - 1} for split {split!r}; got {index}."
        )
    task_type = _task_type(split, index, size)
    draw = Draw(f"household/{VERSION}/{size}/{split}/{index}")
    room = draw.choice(TASK_ROOMS[task_type])
    while True:
        number = 1 + draw.below(TRAIN_SCENES)
        if split == "valid_unseen":
            number = TRAIN_SCENES + 1 + draw.below(UNSEEN_SCENES)
        counts = dict(scene(room, number, size))
        choices = _choices(task_type, room, tuple(counts))
        if choices:  # a small room may lack every place for the task's objects: draw another
            break
    wanted, targets = draw.choice(choices)
    target = draw.choice(targets)
    room_lamp = _room_lamp(room)
    lamp = room_lamp if task_type == LOOK else ""
    copies = (2 if task_type == TWO else 1) + (draw.below(8) == 0)
    avoid = target if task_type in (SIMPLE, TWO) else ""
    located = [(wanted, *_place(draw, wanted, counts, avoid)) for _ in range(copies)]
    for name in _clutter(draw, room, wanted, room_lamp, counts, size):
        located.append((name, *_place(draw, name, counts, "")))
    return TaskSpec(
        id=f"household/{size}/{split}/{index}",
        type=task_type,
        goal=_goal(draw, task_type, wanted, target, lamp),
        room=room,
        scene=number,
        object=wanted,
        target=target,
        lamp=lamp,
        places=(places := _listed(counts)),
        objects=_numbered(located, places),
    )


def _listed(counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for name in counts for number in range(1, counts[name] + 1))


def _numbered(
    located: Sequence[tuple[str, str, int]], places: Sequence[tuple[str, int]]
) -> tuple[tuple[str, int, int], ...]:
    index = {place: i for i, place in enumerate(places)}
    seen: dict[str, int] = {}
    objects = []
    # Stable by type, so numbers follow the order of the draws and say nothing about places.
    for name, place, number in sorted(located, key=lambda item: item[0]):
        seen[name] = seen.get(name, 0) + 1
        objects.append((name, seen[name], index[place, number]))
    return tuple(objects)
