"""From a config to the players that know its environment: who demonstrates, and who is compared."""

import random
from collections.abc import Callable

from ml_collections import FrozenConfigDict

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.react import Random
from opd_jax.experience.demonstrations import MakePlayer, Player


def make_player(name: str, config: FrozenConfigDict, *, field: str) -> MakePlayer:
    """A player of `config.env` by name; every environment has `random`, and most an `expert`.

    Args:
      name: of the player.
      config: of the run.
      field: what asks for it, to be named in errors.

    Raises:
      ValueError: the environment has no such player.
    """
    known = _PLAYERS[config.env.name](config)
    if name not in known:
        raise ValueError(
            f"`{field}`: {config.env.name} has no player {name!r}, expected one of "
            f"{', '.join(known)}"
        )
    return known[name]


def check_players(config: FrozenConfigDict) -> None:
    """Finds every player that the config names, or raises as `make_player` does."""
    data = config.data
    wanted = [("eval.who", who) for who in config.eval.who if who not in ("before", "teacher")]
    if data.source == "expert":
        wanted.append(("data.source", "expert"))
    if data.source == "players":
        wanted.append(("data.player", data.player))
        wanted += [("data.distractors", distractor) for distractor in data.distractors]
    for field, name in wanted:
        make_player(name, config, field=field)


def _random(task: Task, first: Observation, rng: random.Random) -> Player:
    return Random(rng)


def _household(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs.household import expert, habits

    def of(kind: Callable[..., Player], group: str = "") -> MakePlayer:
        def make(task: Task, first: Observation, rng: random.Random) -> Player:
            settings = config.data[group].to_dict() if group else {}
            return kind(task, first, rng=rng, **settings)

        return make

    return {
        "expert": of(expert.Expert),
        "careless": of(habits.Careless, "careless"),
        "forgetful": of(habits.Forgetful, "forgetful"),
        "clumsy": of(habits.Clumsy),
        "mistaken": of(habits.Mistaken),
        "random": _random,
    }


def _alfworld(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs.alfworld.expert import Expert

    return {
        "expert": lambda task, first, rng: Expert(task, first, rng=rng),
        "random": _random,
    }


def _scienceworld(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs.scienceworld import players

    env = config.env
    paths = players.gold_paths(
        simplifications=env.simplifications, heap_mb=env.heap_mb, timeout_s=env.timeout_s
    )
    return {
        "expert": lambda task, first, rng: players.Expert(paths(task.id)),
        "random": _random,
    }


def _searchqa(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs.search import players

    return {"random": lambda task, first, rng: players.Random(task.goal, rng=rng)}


def _factbookqa(config: FrozenConfigDict) -> dict[str, MakePlayer]:
    from opd_jax.envs.search.factbook_players import Expert

    return {"expert": lambda task, first, rng: Expert(task)} | _searchqa(config)


_PLAYERS = {
    "household": _household,
    "alfworld": _alfworld,
    "scienceworld": _scienceworld,
    "searchqa": _searchqa,
    "factbookqa": _factbookqa,
}
