"""Environments from their settings: one of ours by name, or anybody's by `module:Class`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opd_jax.envs.base import Env, MakePlayer, Parse, Rule
from opd_jax.envs.workers import Worker, check_limits
from opd_jax.runtime import by as named
from opd_jax.runtime.fields import WORLD, affects, check_within

# Imported when asked for: all but the household need an extra.
ENVS = {
    "household": "opd_jax.envs.household.env:Household",
    "alfworld": "opd_jax.envs.alfworld.env:AlfWorld",
    "scienceworld": "opd_jax.envs.scienceworld.env:ScienceWorld",
    "searchqa": "opd_jax.envs.search.searchqa:open_searchqa",
    "factbookqa": "opd_jax.envs.search.factbook:FactbookQA",
    "gymnasium": "opd_jax.envs.gymnasium:Gymnasium",
}


@dataclass(frozen=True)
class EnvSettings:
    """Which environment, and how it is run.

    Attributes:
      by: a key of `ENVS`, or `module:Class`.
      workers: each environment in a process of its own.
      start_timeout_s: of a worker's start; see `workers.Worker`.
      step_timeout_s: of a worker's step.
      max_turns: K, of an episode.
      options: further keyword arguments of the environment, as pairs, so that settings hash.
    """

    by: str
    workers: bool = field(metadata=affects(WORLD))
    start_timeout_s: float = field(metadata=affects(WORLD))
    step_timeout_s: float = field(metadata=affects(WORLD))
    max_turns: int
    options: tuple[Any, ...]

    def __post_init__(self):
        check_within(1, max_turns=self.max_turns)
        check_limits(start_timeout_s=self.start_timeout_s, step_timeout_s=self.step_timeout_s)


def make_env(settings: EnvSettings, **changes: Any) -> Env:
    """A new environment; in a process of its own with `workers`.

    Args:
      settings: see `EnvSettings`.
      **changes: take the place of some of its options.

    Raises:
      ValueError: an unknown name, options that are another environment's, or what the environment
        itself misses, such as its extra.
    """
    arguments = {**dict(settings.options), "max_turns": settings.max_turns, **changes}
    kind = find_env(settings.by)
    named.check_arguments(settings.by, kind, arguments, section="env")
    make = partial(kind, **arguments)
    if not settings.workers:
        return make()
    return Worker(
        make, start_timeout_s=settings.start_timeout_s, step_timeout_s=settings.step_timeout_s
    )


def find_env(by: str) -> Callable[..., Env]:
    """The class or function that `env.by` names; ValueError if there is none."""
    found = named.find(by, ENVS, section="env")
    if not callable(found):
        raise ValueError(
            f"`env.by` = {by!r}: expected a class or a function that makes an environment, got a "
            f"{type(found).__name__}"
        )
    return found


def world_options(by: str) -> tuple[str, ...]:
    """Names of an environment's options that change neither tasks nor answers (its `world`)."""
    return getattr(find_env(by), "world", ())


def figures_options(by: str) -> tuple[str, ...]:
    """Names of an environment's options that change only tasks to evaluate (its `figures`)."""
    return getattr(find_env(by), "figures", ())


def labels_turns(by: str) -> bool:
    """Whether an environment's observations have an `oracle` (its `labels_turns`)."""
    return getattr(find_env(by), "labels_turns", True)


def keeps_record(by: str) -> bool:
    """Whether an environment keeps a record of what it has said (`base.Records`)."""
    return hasattr(find_env(by), "record")


def own_rule(by: str) -> Rule | None:
    """The rule that judges an environment's turns by their records (its `rule`); None: none."""
    return getattr(find_env(by), "rule", None)


def own_parse(by: str) -> Parse | None:
    """What finds the command in a response to an environment (its `parse`); None: unknown."""
    return getattr(find_env(by), "parse", None)


def judges_responses(by: str) -> bool:
    """Whether an environment can judge a response that nobody carries out, from its record."""
    return bool(own_rule(by) and own_parse(by)) and keeps_record(by)


def invented(by: str) -> re.Pattern[str] | None:
    """Where an invented turn begins in a response (an environment's `invented`); None: unknown."""
    return getattr(find_env(by), "invented", None)


def own_players(by: str) -> Mapping[str, MakePlayer]:
    """The players that an environment brings along (its `players`), by name."""
    return getattr(find_env(by), "players", {})


def benchmark_splits(by: str) -> tuple[str, ...]:
    """The splits whose mean is a benchmark's figure; () where each split stands for itself."""
    if by != "searchqa":
        return ()
    from opd_jax.envs.search.searchqa_data import SETS

    return tuple(SETS)
