"""The household's record of an episode: what its texts have said so far, in four lists."""

from typing import NamedTuple

from opd_jax.envs.base import Observation
from opd_jax.envs.household.expert import Memory

CLOSED = ", closed"
EMPTY = "nothing"
DONE = "done"
NO_COMMAND = "no command"


class Record:
    """Reads the observations of an episode, as a player does; it never touches the world.

    Args:
      first: the observation that `reset` returned.
    """

    def __init__(self, first: Observation):
        self._memory = Memory(first.text)
        # Places in the order in which they were reached -> whether they were ever found closed.
        self._reached: dict[str, bool] = {}
        self._tried: tuple[str, ...] = ()

    def update(self, observation: Observation) -> None:
        """Read the answer to a turn."""
        self._memory.update(observation)
        if at := self._memory.at:
            self._reached[at] = self._reached.get(at, False) or at in self._memory.shut
        how = observation.text if observation.failure else DONE
        self._tried += (f"{observation.action or NO_COMMAND}: {how}",)

    def lists(self) -> dict[str, tuple[str, ...]]:
        """The record (`base.Records`).

        - `seen`: `desk 1: pen 2, cd 1`; `desk 1: nothing`; `safe 1, closed` if its content was
          never shown, else `safe 1, closed: cd 1`. In the order in which they were first reached.
        - `held`: `pen 2`, or no entry.
        - `changed`: `apple 1: hot and clean`; `safe 1: open` if it was found closed.
        - `tried`: `go to desk 1: done`; `open desk 1: Nothing happens.` The rule reads `done`.
        """
        memory = self._memory
        places = [Seen(at, at in memory.shut, memory.content.get(at)) for at in self._reached]
        opened = [seen.place for seen in places if self._reached[seen.place] and not seen.closed]
        states = [f"{name}: {_listed(known)}" for name, known in memory.states.items()]
        return {
            "seen": tuple(map(str, places)),
            "held": (memory.hand,) if memory.hand else (),
            "changed": (*states, *(f"{place}: open" for place in opened)),
            "tried": self._tried,
        }


def _listed(states: set[str]) -> str:
    return " and ".join(sorted(states, key="clean".__eq__))


class Seen(NamedTuple):
    """A place that was reached: whether it is closed, and its content; None: never shown."""

    place: str
    closed: bool
    content: list[str] | None

    def __str__(self) -> str:
        name = self.place + CLOSED * self.closed
        return name if self.content is None else f"{name}: {', '.join(self.content) or EMPTY}"


def read_seen(entry: str) -> Seen:
    """An entry of the record's list `seen`, read again."""
    name, shown, listed = entry.partition(": ")
    content = [thing for thing in listed.split(", ") if thing != EMPTY]
    return Seen(name.removesuffix(CLOSED), name.endswith(CLOSED), content if shown else None)
