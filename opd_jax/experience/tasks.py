"""Which tasks a run plays: the splits of its environment, and the order of training tasks."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.envs.base import Env
from opd_jax.report.writers import read_summary, write_summary
from opd_jax.runtime import processes

# In a workdir: the digest of each split that the run plays.
TASKS_FILE = "tasks.json"


class Panel(NamedTuple):
    """How many tasks a split has, and which, as its environment says."""

    size: int
    digest: str


def split_size(env: Env, split: str, *, field: str) -> int:
    """Number of tasks in a split that a setting names.

    Raises:
      ValueError: the split is unknown or empty; names `field`.
    """
    try:
        size = env.size(split)
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from None
    if size < 1:
        raise ValueError(f"`{field}`: split {split!r} has no tasks; choose another or fill it")
    return size


def find_panels(env: Env, splits: Mapping[str, str]) -> dict[str, Panel]:
    """The tasks of every split.

    Args:
      env: is asked.
      splits: each split, and the setting that names it.

    Raises:
      ValueError: as `split_size` does, or processes of the run have different tasks.
    """
    found = {
        split: Panel(split_size(env, split, field=field), env.digest(split))
        for split, field in splits.items()
    }
    for process, others in enumerate(processes.gather(found)):
        different = [split for split in found if others[split] != found[split]]
        if different:
            split = different[0]
            raise ValueError(
                f"`env`: process {process} has other tasks than process {jax.process_index()} "
                f"({describe(split, others[split])}; {describe(split, found[split])}); give all "
                "machines the same data"
            )
    return found


def describe(split: str, tasks: Panel) -> str:
    """A line that says which tasks a split has."""
    return f"{split}: {tasks.size} tasks, digest {tasks.digest}"


def check_same_tasks(split: str, tasks: Panel, workdir: Path) -> None:
    """Makes sure that the training tasks are those that a workdir's run was started on.

    The same config may name other tasks: files in a folder change, or `ALFWORLD_DATA` names another
    folder.

    Args:
      split: `data.split`.
      tasks: which it has now.
      workdir: of a run; without `TASKS_FILE` nothing is known and nothing is refused.

    Raises:
      ValueError: they differ; names the field and both digests.
    """
    before, now = read_summary(workdir / TASKS_FILE).get(split), tasks.digest
    if before not in (None, now):
        raise ValueError(
            f"`data.split`: the tasks of {split!r} are not those that the run in `{workdir}` was "
            f"started on (digest {before} then, {now} now); give it the same data, or choose "
            "another --workdir"
        )


def store_tasks(found: Mapping[str, Panel], workdir: Path) -> None:
    """Writes the digest of every split into a workdir, and says them."""
    for split, tasks in found.items():
        processes.say(describe(split, tasks))
    digests = {split: tasks.digest for split, tasks in found.items()}
    write_summary(workdir / TASKS_FILE, digests, write=processes.is_first())


def train_tasks(size: int, *, seed: int, start: int, count: int) -> list[int]:
    """Tasks number `start` to `start + count` of an endless series of shuffled epochs."""
    tasks = []
    for number in range(start, start + count):
        epoch, place = divmod(number, size)
        tasks.append(int(_permutation(size, seed, epoch)[place]))
    return tasks


@lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
