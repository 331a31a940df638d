"""The tasks that a run plays: how many each split has, which, and in what order."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.envs.base import Env, NoTasks
from opd_jax.report.writers import read_summary, write_summary
from opd_jax.runtime import processes

# File in a workdir with the digest of each split.
TASKS_FILE = "tasks.json"


class Panel(NamedTuple):
    """The number of a split's tasks, and a digest that tells which tasks they are."""

    size: int
    digest: str


_NONE = Panel(0, "none")


def split_size(env: Env, split: str, *, field: str) -> int:
    """The number of tasks in a split that the setting `field` names.

    Raises:
      ValueError: the split is unknown or empty; names `field`. `NoTasks` if its data is missing.
    """
    try:
        size = env.size(split)
    except ValueError as error:
        kind = NoTasks if isinstance(error, NoTasks) else ValueError
        raise kind(f"`{field}`: {error}") from None
    if size < 1:
        raise ValueError(f"`{field}`: split {split!r} has no tasks; choose another or fill it")
    return size


def find_panels(
    env: Env, splits: Mapping[str, str], *, optional: Collection[str] = ()
) -> dict[str, Panel]:
    """The tasks of every split.

    Args:
      splits: maps a split to the setting that names it, for errors.
      optional: splits that are left out with a warning if their data is missing, but not all.

    Raises:
      ValueError: a split is unknown or empty, or the run's processes have different tasks.
    """
    found: dict[str, Panel] = {}
    missing: dict[str, NoTasks] = {}
    for split, field in splits.items():
        try:
            found[split] = Panel(split_size(env, split, field=field), env.digest(split))
        except NoTasks as error:
            if split not in optional:
                raise
            missing[split] = error
    for split, why in missing.items():
        if len(missing) == len(optional):
            raise why
        processes.warn("%s; split %r is left out", why, split)
    check_alike(found)
    return found


def check_alike(found: dict[str, Panel]) -> None:
    """Checks that the run's processes have the same tasks; ValueError otherwise."""
    for process, theirs in enumerate(processes.gather(found)):
        different = [
            split for split in theirs | found if theirs.get(split, _NONE) != found.get(split, _NONE)
        ]
        if different:
            split = different[0]
            raise ValueError(
                f"`env`: process {process} has other tasks than process {jax.process_index()} "
                f"({describe(split, theirs.get(split, _NONE))}; "
                f"{describe(split, found.get(split, _NONE))}); give all "
                "machines the same data"
            )


def describe(split: str, tasks: Panel) -> str:
    """A split's number of tasks and digest, as a line of text."""
    return f"{split}: {tasks.size} tasks, digest {tasks.digest}"


def check_same_tasks(split: str, tasks: Panel, workdir: Path) -> None:
    """Checks that the training tasks are those that the workdir's run was started on.

    The same config may give other tasks later: files in a folder change, or `ALFWORLD_DATA` names
    another folder. A workdir without `TASKS_FILE` passes.

    Raises:
      ValueError: they differ; names the field and both digests.
    """
    before, now = read_summary(workdir / TASKS_FILE).get(split), tasks.digest
    if before not in (None, now):
        raise ValueError(
            f"`data.split`: the tasks of {split!r} are not those that the run in `{workdir}` was "
            f"started on (digest {before} then, {now} now); provide the same data, or choose "
            "another --workdir"
        )


def store_tasks(found: Mapping[str, Panel], workdir: Path) -> None:
    """Prints the tasks of every split and writes their digests into a workdir."""
    for split, tasks in found.items():
        processes.say(describe(split, tasks))
    digests = {split: tasks.digest for split, tasks in found.items()}
    write_summary(workdir / TASKS_FILE, digests)


@dataclass(frozen=True)
class TaskOrder:
    """The order of the training tasks: an endless series of shuffled epochs.

    Attributes:
      split: the tasks' split.
      size: number of tasks in it.
      seed: shuffles the epochs.
      count: tasks of an update.
      per_task: episodes of each task.
    """

    split: str
    size: int
    seed: int
    count: int
    per_task: int

    def from_number(self, start: int) -> list[tuple[str, int]]:
        """(split, index) of an update's episodes, from task number `start` of the series."""
        tasks = []
        for number in range(start, start + self.count):
            epoch, place = divmod(number, self.size)
            task = int(_permutation(self.size, self.seed, epoch)[place])
            tasks += [(self.split, task)] * self.per_task
        return tasks


@lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
