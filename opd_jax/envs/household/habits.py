"""Players of the household with bad habits: they act as the expert does, with one exception each.

Their mistakes are what a student is made to learn, what a teacher has to recover from, and what
trains a judge.
"""

import copy
import random
from collections.abc import Callable
from functools import partial

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household import thoughts
from opd_jax.envs.household.expert import Expert, kind_of
from opd_jax.envs.household.tables import LOOK, search_order
from opd_jax.envs.react import TRY


class Careless(Expert):
    """Reads and acts as well as the expert, but its policy is poor.

    Its thoughts say honestly what it is going to do. If it wrongly believes that the task is done,
    it takes the object out and puts it back, or walks about.

    Args:
      task, first: as for `Expert`.
      rng: source of all randomness.
      skip_step: probability of an episode in which it forgets to clean, heat or cool.
      list_order: probability of an episode in which it searches in listed order.
      ignore_closed: probability that it passes by a closed receptacle met in a search. It opens it
        only if no other is left; with several left it walks between them.
      idle: probability of a pointless action in each turn.
      forget: probability of an episode in which it takes one of two objects to be enough.
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
        # All three are always drawn, so that one habit does not change the draws of another.
        skips, lists, forgets = (rng.random() < p for p in (skip_step, list_order, forget))
        if skips:
            self.verb = self.state = self.tool = ""
        if forgets:
            self.goal_count = 1
        self.by_list = lists
        self.ignore_closed = ignore_closed
        self.idle = idle
        self.weighed: set[str] = set()  # closed receptacles about which it has decided
        self.passed: set[str] = set()  # those of them that it will not open

    def decide(self) -> tuple[str, str]:
        """The next thought and command."""
        if self.rng.random() < self.idle:
            return self.idle_action()
        if not self.memory.hand and (done := self.believed_done()):
            return self.fidget(done)
        return super().decide()

    def search(self, wanted: str) -> tuple[str, str]:
        """Search as the expert does, but pass some closed receptacles by."""
        at = self.memory.at
        if at in self.memory.shut and at not in self.memory.content:
            if at not in self.weighed:
                self.weighed.add(at)
                if self.rng.random() < self.ignore_closed:
                    self.passed.add(at)
            if at in self.passed and (place := self.next_place(wanted)[1]):
                return thoughts.PASS_CLOSED % at, f"go to {place}"
        return super().search(wanted)

    def next_place(self, wanted: str) -> tuple[list[str], str]:
        """The expert's next place, or the next in listed order. Those passed by come last."""
        memory = self.memory
        missing, place = super().next_place(wanted)
        if not self.by_list and place not in self.passed:
            return missing, place
        unseen = [p for p in memory.places if p not in memory.content and p != memory.at]
        last_resort = unseen[0] if unseen else ""
        return [], next((p for p in unseen if p not in self.passed), last_resort)

    def believed_done(self) -> tuple[str, str] | None:
        """The object whose place makes this player believe that the task is done, if any."""
        if self.goal_count == 2 or self.state or self.type == LOOK:
            return None
        placed = [pair for pair in self.known(self.wanted) if kind_of(pair[1]) == self.target]
        return placed[0] if placed else None

    def fidget(self, done: tuple[str, str]) -> tuple[str, str]:
        """Take the placed object out again, or walk about."""
        memory, (name, place) = self.memory, done
        if self.rng.random() < 0.5:
            if place != memory.at:
                return thoughts.FETCH % done, f"go to {place}"
            if place not in memory.shut:
                return thoughts.DONE_TAKE % name, f"take {name} from {place}"
        elsewhere = self.random_item([p for p in memory.places if p != memory.at])
        return thoughts.DONE_GO % (name, elsewhere), f"go to {elsewhere}"

    def idle_action(self) -> tuple[str, str]:
        """Something possible that cannot help: looking again, or going back."""
        memory = self.memory
        choices = [(thoughts.IDLE_LOOK, "look"), (thoughts.IDLE_INVENTORY, "inventory")]
        if memory.at:
            choices.append((thoughts.IDLE_EXAMINE % memory.at, f"examine {memory.at}"))
        if back := [place for place in memory.content if place != memory.at]:
            place = self.random_item(back)
            choices.append((thoughts.IDLE_REVISIT % place, f"go to {place}"))
        return self.random_item(choices)


class Forgetful(Careless):
    """Acts as the expert does, but forgets a step of the task and then loops.

    It is as orderly as the expert, unlike `Careless`. So a model that has learnt from it can read
    and act, and lacks only the forgotten part of the policy. Once it believes that the task is
    done, it takes the object out and puts it back, again and again.

    Args:
      task, first, rng: as for `Expert`.
      skip_step, forget: as for `Careless`.
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
        others = {"list_order": 0.0, "ignore_closed": 0.0, "idle": 0.0}
        super().__init__(task, first, rng=rng, skip_step=skip_step, forget=forget, **others)

    def fidget(self, done: tuple[str, str]) -> tuple[str, str]:
        """Take the placed object out again."""
        memory, (name, place) = self.memory, done
        if place != memory.at:
            return thoughts.DONE_GO % done, f"go to {place}"
        if place in memory.shut:
            return thoughts.IS_CLOSED % place, f"open {place}"
        return thoughts.DONE_TAKE % name, f"take {name} from {place}"


class Clumsy(Expert):
    """Knows the grammar and the words but not what is there: most of its commands fail.

    As a weak model does, it goes to places that the room lacks, goes back to places it has seen,
    takes what is not there and puts down what it does not hold. A demonstration that continues
    after such a turn shows how to recover. The places are a weak model's near misses: a likely type
    that the room lacks, or the number after a type's last.
    """

    def decide(self) -> tuple[str, str]:
        """A command that does not suit the situation."""
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


# Changes one belief of a player.
Mistake = Callable[[], object]


class Mistaken(Expert):
    """Thinks as the expert does, but in each turn one of its beliefs is wrong.

    It sees an object that is not there, is wrong about what it holds or whether an object is
    treated, counts one place too many, forgets where it has searched, or mixes up the goal. So its
    thoughts say something false in the expert's words, as a model's mistakes do.
    """

    def decide(self) -> tuple[str, str]:
        """What the expert would do in the world as this player believes it to be."""
        mind = copy.copy(self)
        mind.memory = copy.deepcopy(self.memory)
        mistakes = self.holding(mind) if mind.memory.hand else self.searching(mind)
        self.random_item(mistakes)()
        return Expert.decide(mind)

    def holding(self, mind: Expert) -> list[Mistake]:
        """Possible mistakes with something in hand."""
        memory = mind.memory
        elsewhere = self.random_item(sorted({kind_of(place) for place in memory.places}))
        mistakes: list[Mistake] = [partial(setattr, memory, "hand", "")]
        if mind.target:
            mistakes.append(partial(setattr, mind, "target", elsewhere))
        if mind.state:
            known = mind.state in memory.states.get(memory.hand, ())
            states = set() if known else {mind.state}
            mistakes.append(partial(memory.states.update, {memory.hand: states}))
            mistakes.append(partial(setattr, mind, "tool", elsewhere))
        return mistakes

    def searching(self, mind: Expert) -> list[Mistake]:
        """Possible mistakes with an empty hand."""
        memory, at = mind.memory, mind.memory.at
        imagined = f"{mind.wanted} {1 + int(self.rng.random() * 2)}"
        searched = mind.of_type(mind.likely_types(mind.wanted)[0])
        one_more = f"{mind.likely_types(mind.wanted)[0]} {len(searched) + 1}"

        def miscount() -> None:
            memory.places.append(one_more)
            memory.content = {place: [] for place in searched} | memory.content

        mistakes: list[Mistake] = [partial(setattr, memory, "hand", imagined), miscount]
        if at:
            inside = memory.content.get(at, [])
            mistakes.append(partial(memory.content.update, {at: [*inside, imagined]}))
            mistakes.append(memory.content.clear)
            others = {kind_of(name) for name in inside} - {mind.wanted}
            mistakes += [partial(setattr, mind, "wanted", kind) for kind in sorted(others)[:1]]
        if at in memory.shut:
            mistakes.append(partial(memory.content.update, {at: []}))
        return mistakes


class Stubborn(Mistaken):
    """Is mistaken, and after a failure says the same again, as a model that loops does.

    Args:
      task, first, rng: as for `Expert`.
      again: probability that it says its last response again after a failure.
    """

    def __init__(self, task: Task, first: Observation, *, rng: random.Random, again: float):
        super().__init__(task, first, rng=rng)
        self.again = again
        self.said = ""

    def respond(self, observation: Observation) -> str:
        """Read an observation and answer."""
        if not (self.said and observation.failure and self.rng.random() < self.again):
            self.said = super().respond(observation)
        return self.said
