"""Players of the household world: an expert, and some with habits.

A player reads what an agent reads: the task, and the text, command and failure of each
observation. It never touches the world. Its memory follows the texts, so it stays right when
somebody else has acted in between, and when an action failed.

Each response works out its command in the thought, one test at a time, and names what a test is
about before saying how it came out: what is in hand or looked for, its state, whether it is here,
whether the likely place is in the room. So each word is easy to predict from the text so far.
"""

import copy
import itertools
import random
import re
from collections.abc import Callable
from functools import partial

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household_scenes import (
    LAMPS,
    LOOK,
    OBJECTS,
    OPENABLE,
    RECEPTACLES,
    TREATMENTS,
    TWO,
    search_order,
)

RESPONSE = "Thought: %s\nAction: %s"

# Thoughts; %s is a type, or a name with its number. A thought begins with the aim.
FIND = "find %s. "
FIND_ANOTHER = "one placed. find another %s. "
HAVE = "i have %s. "
IT_IS = "it is %s. "
IT_IS_NOT = "it is not %s. "
# And goes on with what to do about it. Likely places are tested one by one.
NOT_THERE = "%s is not there. "
NONE_HERE = "none here. %s%s is next."
IS_CLOSED = "%s is closed. open it."
TAKE = "%s is here. take it."
FETCH = "%s is in %s. get it."
USE_LAMP = "%s is here. use it."
GO_ON = "go to %s."
TREAT = "i am at %s. %s it."
PLACE = "i am at %s. place it."
PUT_DOWN = "put it down."
NOTHING_LEFT = "nothing to do. look."
PASS_CLOSED = "%s is closed. skip it."
# Of those with habits.
DONE_TAKE = "%s is placed. take it."
DONE_GO = "%s is placed. go to %s."
IDLE_LOOK = "look."
IDLE_INVENTORY = "check my hand."
IDLE_EXAMINE = "check %s."
IDLE_REVISIT = "go back to %s."
TRY = "try this."

_AIMS = (FIND, FIND_ANOTHER, HAVE, HAVE + IT_IS, HAVE + IT_IS_NOT, HAVE + FIND)
_PLANS = (
    *(NONE_HERE.replace("%s%s", f"{tested}%s") for tested in ("", 2 * NOT_THERE)),
    *(IS_CLOSED, TAKE, FETCH, USE_LAMP, GO_ON, TREAT, PLACE, PUT_DOWN, NOTHING_LEFT, PASS_CLOSED),
)
# Every thought, for whoever builds a vocabulary; `RESPONSE` comes around it.
THOUGHTS = (
    *(aim + plan for aim in _AIMS for plan in _PLANS),
    *(DONE_TAKE, DONE_GO, IDLE_LOOK, IDLE_INVENTORY, IDLE_EXAMINE, IDLE_REVISIT, TRY),
)

_NAMED = re.compile(r"([a-z]+) (\d+)")
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


class Memory:
    """What the texts of an episode have told so far.

    Attributes:
      places: receptacles in listed order.
      at: where the player stands; "" in the middle of the room.
      hand: the object in hand; "" for none.
      content: per receptacle seen inside, its objects in listed order.
      shut: receptacles known to be closed, or believed to be (openable and never seen open).
      states: per object, the states known to hold.
    """

    def __init__(self, scene: str):
        self.places = [f"{kind} {number}" for kind, number in _NAMED.findall(scene)]
        self.at = self.hand = ""
        self.content: dict[str, list[str]] = {}
        self.shut = {place for place in self.places if kind_of(place) in OPENABLE}
        self.states: dict[str, set[str]] = {}

    def update(self, observation: Observation) -> None:
        """Take in one observation, whoever acted."""
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
            # The text names the type only; the number is in the command that led to it.
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
            self.content[place] = [f"{k} {n}" for k, n in _NAMED.findall(match[3])]

    def _treated(self, name: str, state: str) -> None:
        states = self.states.setdefault(name, set())
        if state != "clean":
            states -= {"hot", "cool"}
        states.add(state)


class Expert:
    """Solves every task by searching likely places first.

    Receptacle types are searched in the public order of `search_order`, beginning with the type at
    hand, numbers ascending, then everything else in listed order. Closed receptacles are opened.
    The expert explores only while it knows no object that serves the goal.

    Args:
      task: the task; its type and goal are read, nothing else.
      first: the observation that `reset` returned.
      rng: source of randomness; the expert itself draws nothing from it.
    """

    def __init__(self, task: Task, first: Observation, *, rng: random.Random):
        self.rng = rng
        self.memory = Memory(first.text)
        self.type = task.type
        words = re.findall(r"[a-z]+", task.goal)
        self.wanted = next(w for w in words if w in OBJECTS and w not in LAMPS)
        self.lamp = next((w for w in words if w in LAMPS), "")
        self.target = next((w for w in words if w in RECEPTACLES), "")
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
            return (FIND_ANOTHER if placed else FIND) % self.wanted + plan, command
        aim = HAVE % hand
        if kind_of(hand) != self.wanted:
            plan, command = self.put_down(hand)
        elif self.type == LOOK:
            aim += FIND % self.lamp
            plan, command = self.use_lamp()
        elif self.state and self.state not in self.memory.states.get(hand, ()):
            aim += IT_IS_NOT % self.state
            plan, command = self.treat(hand)
        else:
            aim += IT_IS % self.state if self.state else ""
            plan, command = self.place(hand)
        return aim + plan, command

    def put_down(self, hand: str) -> tuple[str, str]:
        """Get rid of something useless: here if that is possible, else where the way leads."""
        memory, best = self.memory, self.best_object()
        if memory.at and memory.at not in memory.shut:
            return PUT_DOWN, f"move {hand} to {memory.at}"
        if not best:
            return self.search(self.wanted)
        if best[1] == memory.at:
            return IS_CLOSED % memory.at, f"open {memory.at}"
        return FETCH % best, f"go to {best[1]}"

    def find_object(self) -> tuple[str, str]:
        """Take an object that serves the goal, fetch a known one, or search for one."""
        memory = self.memory
        best = self.best_object()
        if not best:
            return self.search(self.wanted)
        name, place = best
        if place != memory.at:
            return FETCH % best, f"go to {place}"
        if place in memory.shut:
            return IS_CLOSED % place, f"open {place}"
        return TAKE % name, f"take {name} from {place}"

    def treat(self, hand: str) -> tuple[str, str]:
        """Clean, heat or cool what is in hand."""
        memory = self.memory
        if kind_of(memory.at) == self.tool:
            return TREAT % (self.tool, self.verb), f"{self.verb} {hand} with {memory.at}"
        return GO_ON % self.tool, f"go to {self.of_type(self.tool)[0]}"

    def place(self, hand: str) -> tuple[str, str]:
        """Put what is in hand where the goal wants it."""
        memory, target = self.memory, self.best_target()
        if target != memory.at:
            return GO_ON % self.target, f"go to {target}"
        if target in memory.shut:
            return IS_CLOSED % target, f"open {target}"
        return PLACE % self.target, f"move {hand} to {target}"

    def use_lamp(self) -> tuple[str, str]:
        """Bring what is in hand to the lamp, searching for the lamp if need be."""
        lamps = self.known(self.lamp)
        if not lamps:
            return self.search(self.lamp)
        lamp, place = next((pair for pair in lamps if pair[1] == self.memory.at), lamps[0])
        if place == self.memory.at:
            return USE_LAMP % lamp, f"use {lamp}"
        return FETCH % (lamp, place), f"go to {place}"

    def search(self, wanted: str) -> tuple[str, str]:
        """Open the closed receptacle at hand, or go to the next one."""
        memory = self.memory
        if memory.at in memory.shut and memory.at not in memory.content:
            return IS_CLOSED % memory.at, f"open {memory.at}"
        missing, place = self.next_place(wanted)
        if not place:
            return NOTHING_LEFT, "look"
        tested = "".join(NOT_THERE % name for name in missing)
        return NONE_HERE % (tested, place), f"go to {place}"

    def next_place(self, wanted: str) -> tuple[list[str], str]:
        """The next receptacle to search; "" when all have been seen.

        Of each likely type the first number not searched yet is tested: is it in the room?

        Returns:
          Likely places tested that the room lacks, and the first one that it has.
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
        """Receptacle types where `wanted` may be, as they are searched from here."""
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
        """Objects of a type that have been seen lying somewhere, each with its place."""
        return [
            (name, place)
            for place, names in self.memory.content.items()
            for name in names
            if kind_of(name) == kind
        ]

    def fullest_target(self) -> str:
        """The target with most of the wanted objects known to be in it; "" if all have none."""
        counts = dict.fromkeys(self.of_type(self.target), 0)
        for _, place in self.known(self.wanted):
            if place in counts:
                counts[place] += 1
        fullest = max(counts, key=lambda place: counts[place], default="")
        return fullest if fullest and counts[fullest] else ""

    def best_object(self) -> tuple[str, str] | None:
        """The known object, with its place, that takes the fewest actions to bring to the goal."""
        candidates = self.known(self.wanted)
        if self.goal_count == 2:
            fullest = self.fullest_target()
            candidates = [pair for pair in candidates if pair[1] != fullest]
        return min(candidates, key=self.effort, default=None)

    def effort(self, candidate: tuple[str, str]) -> int:
        """Actions that a known object needs before it can be placed, up to a constant."""
        name, place = candidate
        effort = (place != self.memory.at) + (place in self.memory.shut)
        if self.state and self.state not in self.memory.states.get(name, ()):
            effort += 1 + (kind_of(place) != self.tool)
        return effort

    def best_target(self) -> str:
        """The target that takes the fewest actions to place something in."""
        if self.goal_count == 2 and (fullest := self.fullest_target()):
            return fullest
        memory = self.memory
        return min(
            self.of_type(self.target),
            key=lambda place: (place != memory.at) + (place in memory.shut),
        )


class Careless(Expert):
    """An expert with bad habits: it reads and acts as well, but its policy is poor.

    Its thoughts say honestly what it is going to do. When it wrongly believes that the task is
    done it takes the object out and puts it back, or walks about.

    Args:
      task, first: as for `Expert`.
      rng: source of all randomness.
      skip_step: probability that for the whole episode it forgets to clean, heat or cool.
      list_order: probability that for the whole episode it searches in listed order.
      ignore_closed: probability, for each closed receptacle met while searching, of never opening
        it, unless it is the only one left; with several left it walks between them.
      idle: probability, for each turn, of a pointless action.
      forget: probability that for the whole episode it takes one of two objects to be enough.
    """

    def __init__(
        self,
        task: Task,
        first: Observation,
        *,
        rng: random.Random,
        skip_step: float,
        list_order: float,
        ignore_closed: float,
        idle: float,
        forget: float,
    ):
        super().__init__(task, first, rng=rng)
        # All four are drawn always, so that one habit does not change the draws of another.
        skips, lists, forgets = (rng.random() < p for p in (skip_step, list_order, forget))
        if skips:
            self.verb = self.state = self.tool = ""
        if forgets:
            self.goal_count = 1
        self.by_list = lists
        self.ignore_closed = ignore_closed
        self.idle = idle
        self.weighed: set[str] = set()  # closed receptacles it has decided about
        self.passed: set[str] = set()  # those that it has decided not to open

    def decide(self) -> tuple[str, str]:
        """The next thought and command."""
        if self.rng.random() < self.idle:
            return self.idle_action()
        if not self.memory.hand and (done := self.believed_done()):
            return self.fidget(done)
        return super().decide()

    def search(self, wanted: str) -> tuple[str, str]:
        """As the expert, except that closed receptacles may be passed by."""
        at = self.memory.at
        if at in self.memory.shut and at not in self.memory.content:
            if at not in self.weighed:
                self.weighed.add(at)
                if self.rng.random() < self.ignore_closed:
                    self.passed.add(at)
            if at in self.passed and (place := self.next_place(wanted)[1]):
                return PASS_CLOSED % at, f"go to {place}"
        return super().search(wanted)

    def next_place(self, wanted: str) -> tuple[list[str], str]:
        """In listed order with probability `list_order`; those passed by come again at the end."""
        memory = self.memory
        missing, place = super().next_place(wanted)
        if not self.by_list and place not in self.passed:
            return missing, place
        unseen = [p for p in memory.places if p not in memory.content and p != memory.at]
        last_resort = unseen[0] if unseen else ""
        return [], next((p for p in unseen if p not in self.passed), last_resort)

    def believed_done(self) -> tuple[str, str] | None:
        """An object in a target that, to this player, means that the task is done."""
        if self.goal_count == 2 or self.state or self.type == LOOK:
            return None
        placed = [pair for pair in self.known(self.wanted) if kind_of(pair[1]) == self.target]
        return placed[0] if placed else None

    def fidget(self, done: tuple[str, str]) -> tuple[str, str]:
        """Take the placed object out again, or walk about."""
        memory, (name, place) = self.memory, done
        if self.rng.random() < 0.5:
            if place != memory.at:
                return FETCH % done, f"go to {place}"
            if place not in memory.shut:
                return DONE_TAKE % name, f"take {name} from {place}"
        elsewhere = self.random_item([p for p in memory.places if p != memory.at])
        return DONE_GO % (name, elsewhere), f"go to {elsewhere}"

    def idle_action(self) -> tuple[str, str]:
        """Something possible that cannot help: looking again, or going back."""
        memory = self.memory
        choices = [(IDLE_LOOK, "look"), (IDLE_INVENTORY, "inventory")]
        if memory.at:
            choices.append((IDLE_EXAMINE % memory.at, f"examine {memory.at}"))
        if back := [place for place in memory.content if place != memory.at]:
            place = self.random_item(back)
            choices.append((IDLE_REVISIT % place, f"go to {place}"))
        return self.random_item(choices)


class Forgetful(Careless):
    """An expert but for one habit: it forgets a step of the task, then loops.

    Where `Careless` is disorderly, this one is as orderly as the expert: a model that has learnt
    from it can read and act, and lacks only the part of the policy that was forgotten. Believing
    the task done, it takes the object out and puts it back, again and again.

    Args:
      task, first, rng: as for `Expert`.
      skip_step: probability that for the whole episode it forgets to clean, heat or cool.
      forget: probability that for the whole episode it takes one of two objects to be enough.
    """

    def __init__(
        self,
        task: Task,
        first: Observation,
        *,
        rng: random.Random,
        skip_step: float,
        forget: float,
    ):
        super().__init__(
            task,
            first,
            rng=rng,
            skip_step=skip_step,
            list_order=0.0,
            ignore_closed=0.0,
            idle=0.0,
            forget=forget,
        )

    def fidget(self, done: tuple[str, str]) -> tuple[str, str]:
        """Take the placed object out again."""
        memory, (name, place) = self.memory, done
        if place != memory.at:
            return DONE_GO % done, f"go to {place}"
        if place in memory.shut:
            return IS_CLOSED % place, f"open {place}"
        return DONE_TAKE % name, f"take {name} from {place}"


class Clumsy(Expert):
    """Knows the grammar and the words but not what is there: most of its commands fail.

    It goes to places that the room lacks, back to where it imagines what it wants, takes what it
    does not see and puts down what it does not hold, as a weak model does; a demonstration that
    goes on from it shows how to recover. The places are near misses, since those are a weak
    model's mistakes: a likely type that the room lacks, or the number after a type's last.
    """

    def decide(self) -> tuple[str, str]:
        """A command that would suit another situation."""
        return TRY, self.misfit()

    def misfit(self) -> str:
        """A place that is not there, or an object that is elsewhere."""
        memory, choice = self.memory, self.rng.random()
        if choice < 0.6 or not memory.at:
            here = [kind_of(memory.at)] * 2 if memory.at else []
            kind = self.random_item([*search_order(self.wanted), *here])
            return f"go to {kind} {len(self.of_type(kind)) + 1}"
        name = f"{self.wanted} {1 + int(self.rng.random() * 2)}"
        seen = [place for place in memory.content if place != memory.at]
        if choice < 0.75 and seen:
            return f"go to {self.random_item(seen)}"
        if choice < 0.9:
            return f"take {name} from {memory.at}"
        return f"move {name} to {memory.at}"


class Mistaken(Expert):
    """Thinks as the expert does, from a picture of the world in which one thing is wrong.

    Each turn another thing: it sees what is not there, believes its hand full or empty, an untreated
    object treated, a place of the room where there is none, has forgotten where it searched, or
    mixes up what the goal asks for. So its thoughts claim something false in the expert's own
    words, as a model's mistakes do.
    """

    def decide(self) -> tuple[str, str]:
        """What the expert would do if the world were as this player believes."""
        mind = copy.copy(self)
        mind.memory = copy.deepcopy(self.memory)
        mistakes = self.holding(mind) if mind.memory.hand else self.searching(mind)
        self.random_item(mistakes)()
        return Expert.decide(mind)

    def holding(self, mind: Expert) -> list[Callable[[], object]]:
        """Mistakes with something in hand; calling one puts it into `mind`."""
        memory = mind.memory
        elsewhere = self.random_item(sorted({kind_of(place) for place in memory.places}))
        mistakes = [partial(setattr, memory, "hand", "")]
        if mind.target:
            mistakes.append(partial(setattr, mind, "target", elsewhere))
        if mind.state:
            known = mind.state in memory.states.get(memory.hand, ())
            states = set() if known else {mind.state}
            mistakes.append(partial(memory.states.update, {memory.hand: states}))
            mistakes.append(partial(setattr, mind, "tool", elsewhere))
        return mistakes

    def searching(self, mind: Expert) -> list[Callable[[], object]]:
        """Mistakes with an empty hand; calling one puts it into `mind`."""
        memory, at = mind.memory, mind.memory.at
        imagined = f"{mind.wanted} {1 + int(self.rng.random() * 2)}"
        searched = mind.of_type(mind.likely_types(mind.wanted)[0])
        one_more = f"{mind.likely_types(mind.wanted)[0]} {len(searched) + 1}"

        def miscount() -> None:
            memory.places.append(one_more)
            memory.content = {place: [] for place in searched} | memory.content

        mistakes = [partial(setattr, memory, "hand", imagined), miscount]
        if at:
            inside = memory.content.get(at, [])
            mistakes.append(partial(memory.content.update, {at: [*inside, imagined]}))
            mistakes.append(memory.content.clear)
            others = {kind_of(name) for name in inside} - {mind.wanted}
            mistakes += [partial(setattr, mind, "wanted", kind) for kind in sorted(others)[:1]]
        if at in memory.shut:
            mistakes.append(partial(memory.content.update, {at: []}))
        return mistakes


class Random:
    """Picks a uniformly random admissible command.

    Args:
      rng: source of randomness.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng

    def respond(self, observation: Observation) -> str:
        """Return a response with a random admissible command."""
        commands = observation.admissible
        return RESPONSE % (TRY, commands[int(self.rng.random() * len(commands))])
