"""Episodes of a model, as histories from which a player goes on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_jax.envs.base import Env, Observation, Task
from opd_jax.report.episodes import read_episodes

# The name of this distractor (`stream.DemonstrationSettings`).
HISTORIES = "histories"


@dataclass(frozen=True)
class History:
    """What a model said in an episode.

    Attributes:
      task_id: of its task, which tells room sizes apart (`Task.id`).
      index: of its task in the split that is trained on.
      responses: the model's, one for each turn.
    """

    task_id: str
    index: int
    responses: tuple[str, ...]

    def player(self, task: Task, first: Observation, rng: random.Random) -> "Replaying":
        """Who says it again."""
        return Replaying(self.responses)


class Replaying:
    """A player that says what was said; nothing when that is used up."""

    def __init__(self, responses: Sequence[str]):
        self._left = iter(responses)

    def respond(self, observation: Observation) -> str:
        """The next response, whatever is observed."""
        return next(self._left, "")


def read_histories(path: Path, *, split: str) -> list[History]:
    """The episodes of a file (docs/episodes.md) with more than one turn.

    Raises:
      ValueError: as `read_episodes`; an episode does not say which task it is of, or is of another
        split: tasks to evaluate are not learnt from; or none is left.
    """
    found = []
    for line in read_episodes(path):
        said = [m["content"] for m in line["messages"] if m["role"] == "assistant"]
        task = line.get("task", {})
        if not all(name in task for name in ("id", "split", "index")):
            raise ValueError(
                f"`demonstrations.histories`: an episode of `{path}` does not say in `task` its "
                "`id`, `split` and `index`, so it cannot be played again"
            )
        if task["split"] != split:
            raise ValueError(
                f"`demonstrations.histories`: an episode of `{path}` is of the split "
                f"{task['split']!r}, expected `data.split` = {split!r}"
            )
        if len(said) > 1:
            found.append(History(task["id"], task["index"], tuple(said)))
    if not found:
        raise ValueError(
            f"`demonstrations.histories`: no episode of `{path}` has more than one turn"
        )
    return found


def env_of(envs: Sequence[Env], split: str, index: int, *, task_id: str) -> Env:
    """The environment in which a task has this `Task.id`, reset to it; rooms differ in size.

    Raises:
      ValueError: there is none.
    """
    for env in envs:
        env.reset(split, index)
        if env.task.id == task_id:
            return env
    raise ValueError(
        f"`demonstrations.histories`: an episode is of {task_id}, which no room of "
        "`demonstrations.sizes` is"
    )
