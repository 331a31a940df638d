"""Any environment with Gymnasium's `reset` and `step` whose observations and actions are texts.

    --config.env.by=gymnasium --config.env.make=my_module:make     # a class or a function
    --config.env.by=gymnasium --config.env.make=gymnasium:make --config.env.id=MyText-v0

The package gymnasium is needed only by what is made. `docs/environments.md` says which of its
`info` are used. Source: gymnasium.farama.org/api/env.
"""

import hashlib
import json
from typing import Any

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.react import INVENTED, parse_response
from opd_jax.envs.turns import TurnClock
from opd_jax.runtime.by import check_arguments, find

NO_COMMAND = "Nothing happens: a reply needs a line `Action: ` with one command."
# Where an environment may say that its goal is reached. Without any, a last reward above 0 does.
SUCCESS = ("success", "is_success", "won")
SAMPLED = 8  # first observations in a digest
LAST_SEED = 2**31 - 1


class Gymnasium:
    """The adapter, as an `Env`.

    Args:
      make: `module:name` of a class or a function that makes the environment.
      max_turns: an episode ends after this many responses, or when the environment ends it.
      system: the system message: the rules, and that a reply ends with a line `Action: ` and one
        command (`envs.react`).
      train_tasks: tasks of the split `train`; task i is `reset(seed=i)`.
      test_tasks: tasks of the split `test`, with seeds down from 2**31 - 1.
      **options: further keyword arguments of what `make` names.

    Raises:
      ValueError: there is no such name, the options are not its own, or splits overlap.
    """

    waits = False
    invented = INVENTED
    labels_turns = False
    figures = ("test_tasks",)

    def __init__(
        self,
        *,
        make: str,
        max_turns: int,
        system: str,
        train_tasks: int,
        test_tasks: int,
        **options: Any,
    ):
        self._clock, self.system = TurnClock(max_turns), system
        self._sizes = {"train": train_tasks, "test": test_tasks}
        if min(self._sizes.values()) < 1 or sum(self._sizes.values()) > LAST_SEED:
            raise ValueError(f"`train_tasks`, `test_tasks`: expected 1 to 2**30, got {self._sizes}")
        self._kind = find(make, {}, section="env", field="make")
        check_arguments(make, self._kind, options, section="env", field="make")
        self._name, self._options = make, options
        self._env = self._kind(**options)

    def size(self, split: str) -> int:
        """Number of tasks in `split`; ValueError unless it is `train` or `test`."""
        if split not in self._sizes:
            raise ValueError(f"expected the split train or test, got {split!r}")
        return self._sizes[split]

    def digest(self, split: str) -> str:
        """SHA-256 over what is made, the number of tasks, and how some of them begin."""
        size, env = self.size(split), self._kind(**self._options)
        begun = [self._begin(env, split, n * size // SAMPLED)[0] for n in range(SAMPLED)]
        made = [self._name, sorted(self._options.items()), size, begun]
        return hashlib.sha256(json.dumps(made, default=repr).encode()).hexdigest()

    def reset(self, split: str, index: int) -> Observation:
        """Start task `index` of `split`."""
        text, info = self._begin(self._env, split, index)
        name = str(self._options.get("id", self._name))
        goal = str(info.get("goal", self.system))
        self.task = Task(f"{name}/{split}/{index}", name, goal, text)
        self._score, self._commands = 0.0, _commands(info)
        self._clock.start()
        return Observation(text, text, self._commands)

    def step(self, response: str) -> Observation:
        """Give the response's command to the environment; without one nothing is given."""
        self._clock.tick()
        command, failure = parse_response(response)
        text, won, over = NO_COMMAND, False, ""
        if not failure:
            text, reward, ended, cut, info = self._env.step(command)
            self._score += float(reward)
            self._commands = _commands(info)
            said = [bool(info[name]) for name in SUCCESS if name in info]
            won = ended and (any(said) if said else reward > 0)
            over = "success" if won else "ended" if ended else "truncated" if cut else ""
        end = self._clock.end(over)
        return Observation(text, text, self._commands, end, self._score, command, failure)

    def _begin(self, env: Any, split: str, index: int) -> tuple[str, dict[str, Any]]:
        if not 0 <= index < self.size(split):
            raise ValueError(f"expected a task from 0 to {self.size(split) - 1}, got {index}")
        begun = env.reset(seed=index if split == "train" else LAST_SEED - index)
        if not (isinstance(begun, tuple) and len(begun) == 2 and isinstance(begun[0], str)):
            raise ValueError(f"`{self._name}`: `reset` gave {begun!r}, expected a text and `info`")
        return begun


def _commands(info: dict[str, Any]) -> tuple[str, ...]:
    return tuple(info.get("admissible_commands") or ())
