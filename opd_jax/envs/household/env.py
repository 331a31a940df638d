"""The household as an `Env`: a text world with ALFWorld's task types, commands and observations."""

import copy
import hashlib
from collections.abc import Mapping

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household.oracle import Learnt, distance, label
from opd_jax.envs.household.record import Record
from opd_jax.envs.household.rule import rule
from opd_jax.envs.household.scenes import check_size, split_size, task
from opd_jax.envs.household.tables import VERSION
from opd_jax.envs.household.world import NOTHING, World
from opd_jax.envs.react import INVENTED, parse_response
from opd_jax.envs.turns import MORE, TurnClock, listed

SYSTEM = (
    "You are in a household. Reply in two lines. "
    "Thought: what you see and plan. Action: one command."
)
TASK_LINE = "\nYour task is to: "
ADMISSIBLE_LINE = "\nAdmissible: "
# The fixed texts of messages, besides those of the world.
PHRASES = (SYSTEM, TASK_LINE, ADMISSIBLE_LINE, MORE)


class Household:
    """The household as an `Env`, one task at a time.

    Args:
      size: `small`, `medium` or `large`; `large` is about as big as ALFWorld's rooms.
      max_turns: an episode ends after this many responses.
      show_admissible: how many admissible commands each message lists; 0 shows none.

    Raises:
      ValueError: the size is unknown, `max_turns` is below 1 or `show_admissible` is below 0.
    """

    system = SYSTEM
    waits = False
    invented = INVENTED
    rule = staticmethod(rule)
    parse = staticmethod(parse_response)

    def __init__(self, *, size: str, max_turns: int, show_admissible: int):
        check_size(size)
        self._clock = TurnClock(max_turns)
        if show_admissible < 0:
            raise ValueError(
                f"`show_admissible` must be 0 (show none) or more; got {show_admissible}."
            )
        self._size = size
        self._show_admissible = show_admissible

    def size(self, split: str) -> int:
        """Number of tasks in `split`; ValueError naming the known splits otherwise."""
        return split_size(split)

    def digest(self, split: str) -> str:
        """SHA-256 over what the tasks of `split` depend on."""
        drawn_from = f"household/{VERSION}/{self._size}/{split}/{split_size(split)}"
        return hashlib.sha256(drawn_from.encode()).hexdigest()

    def reset(self, split: str, index: int) -> Observation:
        """Start task `index` of `split`; ValueError if there is no such task."""
        spec = task(split, index, self._size)
        self._world = World(spec)
        self._learnt = Learnt(self._world)
        self._distance = distance(self._world)
        self._clock.start()
        start = self._world.room.start
        self.task = Task(id=spec.id, type=spec.type, goal=spec.goal, scene=start)
        commands = self._world.admissible()
        message = self._message(start + TASK_LINE + spec.goal, commands)
        first = Observation(start, message, commands)
        self._record = Record(first)
        return first

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text.

        A response without a command (`empty`, `no_action`) or with an impossible one (`rejected`)
        changes nothing. The answer is then `Nothing happens.`.

        Raises:
          ValueError: if there is no running episode.
        """
        self._clock.tick()
        command, failure = parse_response(response)
        text, oracle = NOTHING, ""
        if not failure:
            searching = self._learnt.searching(self._world)
            text = self._world.act(command)
            if text == NOTHING:
                failure = "rejected"
            else:
                oracle = self._label(searching)
        end = self._clock.end("success" if self._world.solved else "")
        commands = self._world.admissible()
        message = self._message(text, commands)
        score = 1.0 if end == "success" else 0.0
        answer = Observation(text, message, commands, end, score, command, failure, oracle)
        self._record.update(answer)
        return answer

    def record(self) -> Mapping[str, tuple[str, ...]]:
        """What the texts of the episode have said so far (`record.Record.lists`)."""
        return self._record.lists()

    def copy(self) -> "Household":
        """Another household in the same state. A step of one leaves the other as it is."""
        other = copy.copy(self)
        other._world = self._world.copy()
        own = self._clock, self._learnt, self._record
        other._clock, other._learnt, other._record = copy.deepcopy(own)
        return other

    def label(self, response: str) -> str:
        """The `oracle` that `step(response)` would have; changes nothing."""
        return self.copy().step(response).oracle

    def _label(self, searching: bool) -> str:
        before, self._distance = self._distance, distance(self._world)
        novel = self._learnt.update(self._world)
        return label(before, self._distance, novel=novel, searching=searching)

    def _message(self, text: str, commands: tuple[str, ...]) -> str:
        if not self._show_admissible:
            return text
        return text + ADMISSIBLE_LINE + listed(commands, self._show_admissible)
