"""Players of an environment by name: every environment has `random`, and most an `expert`."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from opd_jax.envs.base import MakePlayer, Observation, Player, Task
from opd_jax.envs.make import EnvSettings, own_players
from opd_jax.envs.react import Random


def make_player(
    name: str, env: EnvSettings, *, field: str, habits: Mapping[str, Mapping[str, Any]]
) -> MakePlayer:
    """A player of an environment.

    Args:
      name: of the player.
      env: whose players are known by `env.by`. An environment of anybody else's has `random`, and
        those that it brings along (`base.Env`).
      field: what asks for it, to be named in errors.
      habits: keyword arguments of players that take some, by the player's name.

    Raises:
      ValueError: the environment has no such player, or lists no commands for the random one.
    """
    if name == "random" and dict(env.options).get("list_admissible") == 0:
        raise ValueError(
            f"`{field}`: the random player picks among admissible commands, and with "
            "`env.list_admissible` = 0 there are none; set that above 0, or leave the player out"
        )
    if env.by in _PLAYERS:
        known = _PLAYERS[env.by](env, habits)
    else:
        known = {"random": _random, **own_players(env.by)}
    if name not in known:
        raise ValueError(
            f"`{field}`: {env.by} has no player {name!r}, expected one of {', '.join(known)}"
        )
    return known[name]


def _random(task: Task, first: Observation, rng: random.Random) -> Player:
    return Random(rng)


def _household(env: EnvSettings, habits: Mapping[str, Mapping[str, Any]]) -> dict[str, MakePlayer]:
    from opd_jax.envs.household import expert
    from opd_jax.envs.household.habits import Careless, Clumsy, Forgetful, Mistaken, Stubborn

    def of(kind: Callable[..., Player], name: str = "") -> MakePlayer:
        return lambda task, first, rng: kind(task, first, rng=rng, **habits.get(name, {}))

    return {
        "expert": of(expert.Expert),
        "careless": of(Careless, "careless"),
        "forgetful": of(Forgetful, "forgetful"),
        "clumsy": of(Clumsy),
        "mistaken": of(Mistaken),
        "stubborn": of(Stubborn, "stubborn"),
        "random": _random,
    }


def _alfworld(env: EnvSettings, habits: Mapping) -> dict[str, MakePlayer]:
    from opd_jax.envs.alfworld.expert import Expert

    return {"expert": lambda task, first, rng: Expert(task, first, rng=rng), "random": _random}


def _scienceworld(env: EnvSettings, habits: Mapping) -> dict[str, MakePlayer]:
    from opd_jax.envs.scienceworld import players

    options = dict(env.options)
    settings = {name: options[name] for name in ("simplifications", "heap_mb", "timeout_s")}
    paths = players.gold_paths(**settings)
    return {"expert": lambda task, first, rng: players.Expert(paths(task.id)), "random": _random}


def _searchqa(env: EnvSettings, habits: Mapping) -> dict[str, MakePlayer]:
    from opd_jax.envs.search import players

    return {"random": lambda task, first, rng: players.Random(task.goal, rng=rng)}


def _factbookqa(env: EnvSettings, habits: Mapping) -> dict[str, MakePlayer]:
    from opd_jax.envs.search.factbook_players import Expert

    return {"expert": lambda task, first, rng: Expert(task)} | _searchqa(env, habits)


_PLAYERS = {
    "household": _household,
    "alfworld": _alfworld,
    "scienceworld": _scienceworld,
    "searchqa": _searchqa,
    "factbookqa": _factbookqa,
}
