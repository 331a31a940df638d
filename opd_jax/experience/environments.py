"""From a config's `env` to environments."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import FrozenConfigDict

from opd_jax.envs.base import Env
from opd_jax.envs.workers import Worker
from opd_jax.report.writers import read_summary, write_summary
from opd_jax.runtime import processes

# In a workdir: the digest of each split that the run plays.
TASKS_FILE = "tasks.json"

# `env.name` to a module and what makes the environment there, from the other fields of `env`.
# Imported when asked for: all but the household need an extra.
_ENVS = {
    "household": ("household.env", "Household"),
    "alfworld": ("alfworld.env", "AlfWorld"),
    "scienceworld": ("scienceworld.env", "ScienceWorld"),
    "searchqa": ("search.searchqa", "open_searchqa"),
    "factbookqa": ("search.factbook", "FactbookQA"),
}
# Fields of `env` that are not the environment's own.
_AROUND = ("name", "workers", "start_timeout_s", "step_timeout_s")


def make_env(settings: FrozenConfigDict) -> Env:
    """A new environment from `config.env`; in a process of its own with `env.workers`.

    Raises:
      ValueError: an unknown name, fields of `env` that are another environment's, or what the
        environment itself misses, such as its extra.
    """
    if settings.name not in _ENVS:
        raise ValueError(f"`env.name`: expected one of {', '.join(_ENVS)}, got {settings.name!r}")
    module, name = _ENVS[settings.name]
    kind = getattr(importlib.import_module(f"opd_jax.envs.{module}"), name)
    options = {field: value for field, value in settings.items() if field not in _AROUND}
    _check_fields(settings.name, kind, options)
    make = partial(kind, **options)
    if not settings.workers:
        return make()
    return Worker(
        make, start_timeout_s=settings.start_timeout_s, step_timeout_s=settings.step_timeout_s
    )


def _check_fields(name: str, kind: Callable[..., Env], given: Collection[str]) -> None:
    """Compares the fields of `env` with what the environment takes, before it is made."""
    taken = inspect.signature(kind).parameters
    wrong = [f"`env.{field}` is none of its fields" for field in given if field not in taken]
    wrong += [f"`env.{field}` is missing" for field in taken if field not in given]
    if wrong:
        raise ValueError(
            f"`env.name` = {name!r} does not fit the rest of `env`: {', '.join(wrong)}; take a "
            f"config file of this environment, or give `env` the fields {', '.join(taken)}"
        )


def make_envs(settings: FrozenConfigDict, count: int) -> list[Env | None]:
    """An environment for each row of a batch; None for those that other processes have."""
    return [make_env(settings) if processes.owns(row, count) else None for row in range(count)]


def close(envs: Sequence[Env | None]) -> None:
    """Ends the processes of those that have some, sooner than when nobody holds them any more."""
    for env in envs:
        if isinstance(env, Worker):
            env.close()


def split_size(env: Env, field: str, split: str) -> int:
    """Number of tasks in a split that a config names.

    Raises:
      ValueError: the split is unknown or empty; names the config's `field`.
    """
    try:
        size = env.size(split)
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from None
    if size < 1:
        raise ValueError(f"`{field}`: split {split!r} has no tasks; choose another or fill it")
    return size


class Panel(NamedTuple):
    """How many tasks a split has, and which, as its environment says."""

    size: int
    digest: str


@cache  # asked for again and again, and some environments take seconds to make
def panel(settings: FrozenConfigDict, field: str, split: str) -> Panel:
    """The tasks of a split that a config names in `field`; errors as in `split_size`."""
    env = make_env(settings)
    return Panel(split_size(env, field, split), env.digest(split))


def benchmark_splits(settings: FrozenConfigDict) -> tuple[str, ...]:
    """The splits whose mean is a benchmark's figure; () where each split stands for itself."""
    if settings.name != "searchqa":
        return ()
    from opd_jax.envs.search.searchqa_data import SETS

    return tuple(SETS)


def panels(config: FrozenConfigDict) -> dict[str, Panel]:
    """Every split that the config names, by name.

    Raises:
      ValueError: as `split_size` does, or processes of the run have different tasks.
    """
    found = {split: panel(config.env, "eval.splits", split) for split in config.eval.splits}
    found = {config.data.split: panel(config.env, "data.split", config.data.split), **found}
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


def check_same_tasks(split: str, tasks: Panel, workdir: Path) -> None:
    """Makes sure that the training tasks are those that a workdir's run was started on.

    A config may be the same and name other tasks: the files in a folder change, and `ALFWORLD_DATA`
    names another folder.

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


def describe(split: str, tasks: Panel) -> str:
    """A line that says which tasks a split has."""
    return f"{split}: {tasks.size} tasks, digest {tasks.digest}"


def store_tasks(found: Mapping[str, Panel], workdir: Path) -> None:
    """Writes the digest of every split into a workdir, and says them."""
    for split, tasks in found.items():
        processes.say(describe(split, tasks))
    digests = {split: tasks.digest for split, tasks in found.items()}
    write_summary(workdir / TASKS_FILE, digests, write=processes.is_first())
