"""From a config to the players that know its environment: who demonstrates, and who is compared."""

import random
from collections.abc import Callable

from ml_collections import FrozenConfigDict

from opd_jax.demonstrations import MakePlayer, Player
from opd_jax.envs.base import Observation, Task


def make_player(name: str, config: FrozenConfigDict) -> MakePlayer:
    """A player of `config.env` by name; every environment has `random`, and most an `expert`.

    Raises:
      ValueError: the environment has no such player.
    """
    known = _PLAYERS[config.env.name](config)
    if name not in known:
        raise ValueError(
            f"`data.player`, `data.distractors` or `eval.who`: {config.env.name} has no player "
            f"{name!r}, expected one of {', '.join(known)}"
        )
    return known[name]


def _household(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs import household_players as players

    def of(kind: Callable[..., Player], habits: str = "") -> MakePlayer:
        def make(task: Task, first: Observation, rng: random.Random) -> Player:
            settings = config.data[habits].to_dict() if habits else {}
            return kind(task, first, rng=rng, **settings)

        return make

    return {
        "expert": of(players.Expert),
        "careless": of(players.Careless, "careless"),
        "forgetful": of(players.Forgetful, "forgetful"),
        "clumsy": of(players.Clumsy),
        "mistaken": of(players.Mistaken),
        "random": lambda task, first, rng: players.Random(rng=rng),
    }


def _alfworld(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs import alfworld_expert as players

    return {
        "expert": lambda task, first, rng: players.Expert(task, first, rng=rng),
        "random": lambda task, first, rng: players.Random(rng),
    }


def _scienceworld(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs import scienceworld_players as players

    env = config.env
    paths = players.GoldPaths(
        simplifications=env.simplifications, heap_mb=env.heap_mb, timeout_s=env.timeout_s
    )
    return {
        "expert": lambda task, first, rng: players.Expert(paths(task.id)),
        "random": lambda task, first, rng: players.Random(rng),
    }


def _searchqa(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs import search_players as players

    return {"random": lambda task, first, rng: players.Random(task.goal, rng=rng)}


def _factbookqa(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs import factbook_players as players

    return {"expert": lambda task, first, rng: players.Expert(task)} | _searchqa(config)


_PLAYERS = {
    "household": _household,
    "alfworld": _alfworld,
    "scienceworld": _scienceworld,
    "searchqa": _searchqa,
    "factbookqa": _factbookqa,
}
