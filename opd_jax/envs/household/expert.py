"""The household's expert, and the memory that every player keeps.

A player reads what an agent reads: the task, and the text and command of each observation. It never
touches the world. Its memory follows the texts, so it stays right if another player has acted in
between, or if an action has failed.
"""

import itertools
import random
import re

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household import thoughts
from opd_jax.envs.household.tables import (
    LAMPS,
    LOOK,
    OBJECTS,
    OPENABLE,
    RECEPTACLES,
    TREATMENTS,
    TWO,
    search_order,
)
from opd_jax.envs.react import RESPONSE

NAMED = re.compile(r"([a-z]+) (\d+)")
_ARRIVE = re.compile(r"You arrive at (\w+ \d+)\.")
_FACING = re.compile(r"You are facing the (\w+ \d+)\.")
_CONTENT = re.compile(r"(?:On the (\w+ \d+)|The (\w+ \d+) is open\. In it), you see (.*)\.$")
_CLOSED = re.compile(r"The (\w+ \d+) is closed\.")
_SHUT = re.compile(r"You close the (\w+ \d+)\.")
_TOOK = re.compile(r"You pick up the (\w+ \d+) from the (\w+ \d+)\.")
_MOVED = re.compile(r"You move the (\w+ \d+) to the (\w+ \d+)\.")
_TREATED = re.compile(r"You (clean|heat|cool) the (\w+ \d+) using")
_CARRYING = re.compile(r"You are carrying: a (\w+ \d+)\.")
_EXAMINED = re.compile(r"This is a (.*) \w+\.$")
_STATES = {verb: state for verb, state, _ in TREATMENTS.values()}


def kind_of(name: str) -> str:
    """The type in a name such as `cabinet 3`."""
    return name.partition(" ")[0]


def read_goal(goal: str) -> tuple[str, str, str]:
    """The types that a goal names: the wanted object, the lamp and the target; "" for none."""
    words = re.findall(r"[a-z]+", goal)
    wanted = next(word for word in words if word in OBJECTS and word not in LAMPS)
    lamp = next((word for word in words if word in LAMPS), "")
    return wanted, lamp, next((word for word in words if word in RECEPTACLES), "")


class Memory:
    """What the texts of an episode have told so far.

    Attributes:
      places: receptacles in listed order.
      at: the receptacle where the player stands; "" in the middle of the room.
      hand: the object in hand; "" for none.
      content: receptacle whose content has been seen -> its objects in listed order.
      shut: receptacles known or believed to be closed; openable ones are until they are seen open.
      states: object -> the states known to hold.
    """

    def __init__(self, scene: str):
        self.places = [f"{kind} {number}" for kind, number in NAMED.findall(scene)]
        self.at = self.hand = ""
        self.content: dict[str, list[str]] = {}
        self.shut = {place for place in self.places if kind_of(place) in OPENABLE}
        self.states: dict[str, set[str]] = {}

    def update(self, observation: Observation) -> None:
        """Read one observation, whoever acted."""
        text = observation.text
        if match := _ARRIVE.match(text) or _FACING.match(text):
            self.at = match[1]
        if match := _TOOK.match(text):
            self.hand = match[1]
            if match[1] in self.content.get(match[2], ()):
                self.content[match[2]].remove(match[1])
        elif match := _MOVED.match(text):
            self.hand = ""
            self.content.setdefault(match[2], []).append(match[1])
        elif match := _TREATED.match(text):
            self._treated(match[2], _STATES[match[1]])
        elif match := _CARRYING.match(text):
            self.hand = match[1]
        elif match := _EXAMINED.match(text):
            # The text names only the type; the number is in the command.
            name = " ".join(observation.action.lower().rstrip(" .\t").split()[1:])
            self.states[name] = set(match[1].split(" and "))
        else:
            self._saw(text)

    def _saw(self, text: str) -> None:
        if match := _SHUT.match(text) or _CLOSED.search(text):
            self.shut.add(match[1])
        elif match := _CONTENT.search(text):
            place = match[1] or match[2]
            self.shut.discard(place)
            self.content[place] = [f"{k} {n}" for k, n in NAMED.findall(match[3])]

    def _treated(self, name: str, state: str) -> None:
        states = self.states.setdefault(name, set())
        if state != "clean":
            states -= {"hot", "cool"}
        states.add(state)


class Expert:
    """Solves every task by searching likely places first.

    It searches only while it knows no object that serves the goal. It goes through the receptacle
    types in the public order of `search_order`, beginning with the type where it stands, and
    through the numbers of a type in ascending order. All other receptacles follow in listed order.
    It opens the closed ones.

    Args:
      task: only its type and goal are read.
      first: the observation that `reset` returned.
      rng: source of randomness for players derived from this one; the expert draws nothing.
    """

    def __init__(self, task: Task, first: Observation, *, rng: random.Random):
        self.rng = rng
        self.memory = Memory(first.text)
        self.type = task.type
        self.wanted, self.lamp, self.target = read_goal(task.goal)
        self.verb, self.state, self.tool = TREATMENTS.get(task.type, ("", "", ""))
        self.goal_count = 2 if task.type == TWO else 1

    def respond(self, observation: Observation) -> str:
        """Read an observation and return `Thought: ...`, newline, `Action: ...`."""
        self.memory.update(observation)
        return RESPONSE % self.decide()

    def decide(self) -> tuple[str, str]:
        """The next thought and command."""
        hand = self.memory.hand
        if not hand:
            placed = self.goal_count == 2 and self.fullest_target()
            plan, command = self.find_object()
            aim = thoughts.FIND_ANOTHER if placed else thoughts.FIND
            return aim % self.wanted + plan, command
        aim = thoughts.HAVE % hand
        if kind_of(hand) != self.wanted:
            plan, command = self.put_down(hand)
        elif self.type == LOOK:
            aim += thoughts.FIND % self.lamp
            plan, command = self.use_lamp()
        elif self.state and self.state not in self.memory.states.get(hand, ()):
            aim += thoughts.IT_IS_NOT % self.state
            plan, command = self.treat(hand)
        else:
            aim += thoughts.IT_IS % self.state if self.state else ""
            plan, command = self.place(hand)
        return aim + plan, command

    def put_down(self, hand: str) -> tuple[str, str]:
        """Put a useless object down: here if possible, else at the next place on the way."""
        memory, best = self.memory, self.best_object()
        if memory.at and memory.at not in memory.shut:
            return thoughts.PUT_DOWN, f"move {hand} to {memory.at}"
        if not best:
            return self.search(self.wanted)
        if best[1] == memory.at:
            return thoughts.IS_CLOSED % memory.at, f"open {memory.at}"
        return thoughts.FETCH % best, f"go to {best[1]}"

    def find_object(self) -> tuple[str, str]:
        """Take an object that serves the goal, fetch a known one, or search for one."""
        memory = self.memory
        best = self.best_object()
        if not best:
            return self.search(self.wanted)
        name, place = best
        if place != memory.at:
            return thoughts.FETCH % best, f"go to {place}"
        if place in memory.shut:
            return thoughts.IS_CLOSED % place, f"open {place}"
        return thoughts.TAKE % name, f"take {name} from {place}"

    def treat(self, hand: str) -> tuple[str, str]:
        """Clean, heat or cool what is in hand."""
        memory = self.memory
        if kind_of(memory.at) == self.tool:
            return thoughts.TREAT % (self.tool, self.verb), f"{self.verb} {hand} with {memory.at}"
        return thoughts.GO_ON % self.tool, f"go to {self.of_type(self.tool)[0]}"

    def place(self, hand: str) -> tuple[str, str]:
        """Put what is in hand where the goal wants it."""
        memory, target = self.memory, self.best_target()
        if target != memory.at:
            return thoughts.GO_ON % self.target, f"go to {target}"
        if target in memory.shut:
            return thoughts.IS_CLOSED % target, f"open {target}"
        return thoughts.PLACE % self.target, f"move {hand} to {target}"

    def use_lamp(self) -> tuple[str, str]:
        """Bring what is in hand to the lamp; search for the lamp if its place is not known."""
        lamps = self.known(self.lamp)
        if not lamps:
            return self.search(self.lamp)
        lamp, place = next((pair for pair in lamps if pair[1] == self.memory.at), lamps[0])
        if place == self.memory.at:
            return thoughts.USE_LAMP % lamp, f"use {lamp}"
        return thoughts.FETCH % (lamp, place), f"go to {place}"

    def search(self, wanted: str) -> tuple[str, str]:
        """Open the closed receptacle here, or go to the next one."""
        memory = self.memory
        if memory.at in memory.shut and memory.at not in memory.content:
            return thoughts.IS_CLOSED % memory.at, f"open {memory.at}"
        missing, place = self.next_place(wanted)
        if not place:
            return thoughts.NOTHING_LEFT, "look"
        tested = "".join(thoughts.NOT_THERE % name for name in missing)
        return thoughts.NONE_HERE % (tested, place), f"go to {place}"

    def next_place(self, wanted: str) -> tuple[list[str], str]:
        """The next receptacle to search.

        For each likely type, take the lowest number not searched yet and ask whether the room has
        it.

        Returns:
          The likely places that the room lacks, and the first one that it has; "" if all
          receptacles have been seen.
        """
        memory = self.memory
        missing: list[str] = []
        for kind in self.likely_types(wanted):
            place = next(
                place
                for place in (f"{kind} {number}" for number in itertools.count(1))
                if place not in memory.content and place != memory.at
            )
            if place in memory.places:
                return missing, place
            missing.append(place)
        unseen = (p for p in memory.places if p not in memory.content and p != memory.at)
        return missing, next(unseen, "")

    def likely_types(self, wanted: str) -> tuple[str, ...]:
        """Receptacle types where `wanted` may be, in the order in which to search from here."""
        kinds = search_order(wanted)
        here = kind_of(self.memory.at)
        first = kinds.index(here) if here in kinds else 0
        return kinds[first:] + kinds[:first]

    def of_type(self, kind: str) -> list[str]:
        """Receptacles of a type in listed order."""
        return [place for place in self.memory.places if kind_of(place) == kind]

    def random_item(self, items: list):
        """A uniform item."""
        return items[int(self.rng.random() * len(items))]

    def known(self, kind: str) -> list[tuple[str, str]]:
        """Objects of a type that have been seen, each with its place."""
        return [
            (name, place)
            for place, names in self.memory.content.items()
            for name in names
            if kind_of(name) == kind
        ]

    def fullest_target(self) -> str:
        """The target known to hold the most wanted objects; "" if none holds any."""
        counts = dict.fromkeys(self.of_type(self.target), 0)
        for _, place in self.known(self.wanted):
            if place in counts:
                counts[place] += 1
        fullest = max(counts, key=lambda place: counts[place], default="")
        return fullest if fullest and counts[fullest] else ""

    def best_object(self) -> tuple[str, str] | None:
        """The known object with the fewest actions to the goal, and its place."""
        candidates = self.known(self.wanted)
        if self.goal_count == 2:
            fullest = self.fullest_target()
            candidates = [pair for pair in candidates if pair[1] != fullest]
        return min(candidates, key=self.effort, default=None)

    def effort(self, candidate: tuple[str, str]) -> int:
        """Actions that an object needs before it can be placed, up to a constant."""
        name, place = candidate
        effort = (place != self.memory.at) + (place in self.memory.shut)
        if self.state and self.state not in self.memory.states.get(name, ()):
            effort += 1 + (kind_of(place) != self.tool)
        return effort

    def best_target(self) -> str:
        """The target that takes the fewest actions to put something in."""
        if self.goal_count == 2 and (fullest := self.fullest_target()):
            return fullest
        memory = self.memory
        return min(
            self.of_type(self.target),
            key=lambda place: (place != memory.at) + (place in memory.shut),
        )
