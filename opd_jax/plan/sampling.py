"""The programs of rollouts and evaluations: a copy of the parameters, reading, sampling."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from opd_jax.agent import generate as gen
from opd_jax.agent.generate import Sampling
from opd_jax.model import ModelConfig, is_sharded
from opd_jax.plan.placement import Placement
from opd_jax.plan.program import COPY, Program
from opd_jax.plan.traffic import Moved, device_bytes
from opd_jax.plan.workload import Workload


@dataclass(frozen=True)
class Player:
    """Who reads and samples.

    Attributes:
      sizes: of the model.
      params: abstract.
      beside: names of residents that are not these parameters.
    """

    sizes: ModelConfig
    params: Any
    beside: tuple[str, ...]


def copying(
    config: FrozenConfigDict, trained: Any, copy: Player, *, beside: tuple[str, ...]
) -> Program:
    """The program that makes the copy of the trained parameters to sample with."""
    size = device_bytes(copy.params)
    return Program(
        COPY,
        gen.sampling_params,
        (trained,),
        {
            "config": copy.sizes,
            "dtype": jnp.dtype(config.compute_dtype),
            "gather": config.rollout.gather_weights,
        },
        runs=1,
        trips=None,
        moved=(Moved("parameters", device_bytes(trained), 1), Moved("copy", size, 1)),
        beside=beside,
        temporaries=size,
    )


def rollout(
    config: FrozenConfigDict, player: Player, place: Placement, work: Workload
) -> Iterator[Program]:
    """The programs of an update's episodes."""
    settings = config.rollout
    narrow, wide = settings.extend_widths[0], settings.extend_widths[-1]
    cache = place.cache(player.sizes, player.params, rows=work.rows, slots=work.slots)
    if narrow == wide:
        yield reading("observation", player, place, cache, wide, runs=work.turns)
    else:
        yield reading("first message", player, place, cache, wide, runs=1)
        yield reading("observation", player, place, cache, narrow, runs=work.turns - 1)
    calls = work.sampled / settings.chunk
    how = _how(settings, settings.temperature)
    # Compiled for the cache at its largest, which most tokens do not read.
    read, chunk = work.slots_read / work.slots, settings.chunk
    yield generating("sampling", player, place, cache, how, chunk, runs=calls, read=read)


def evaluation(
    config: FrozenConfigDict, who: str, player: Player, place: Placement, work: Workload
) -> Iterator[Program]:
    """The programs of an evaluation, which is no part of an update."""
    settings = config.rollout
    rows, how = config.eval.batch, _how(settings, config.eval.temperature)
    cache = place.cache(player.sizes, player.params, rows=rows, slots=work.slots)
    width, name = settings.extend_widths[-1], f"evaluating the {who}"
    yield reading(f"{name}: first message", player, place, cache, width, runs=0)
    chunk = settings.chunk
    yield generating(f"{name}: sampling", player, place, cache, how, chunk, runs=0, read=1)


def _how(settings: FrozenConfigDict, temperature: float) -> Sampling:
    return Sampling(temperature=temperature, top_k=settings.top_k, top_p=settings.top_p)


def reading(
    name: str, player: Player, place: Placement, cache: Any, width: int, *, runs: float
) -> Program:
    """Appending up to `width` tokens to every row of a cache."""
    rows = cache.lengths.shape[0]
    return Program(
        name,
        gen.extend,
        (player.params, cache, place.rows(rows, width), place.rows(rows)),
        {"config": player.sizes, "sharded": is_sharded(player.params)},
        runs=runs,
        trips=None,
        moved=gone_through(player, cache, times=1, read=1),
        beside=player.beside,
    )


def generating(
    name: str,
    player: Player,
    place: Placement,
    cache: Any,
    how: Sampling,
    chunk: int,
    *,
    runs: float,
    read: float,
) -> Program:
    """Sampling up to `chunk` tokens for every row of a cache; `read` as in `gone_through`."""
    rows = cache.lengths.shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    stop_ids = place.whole((2,))  # a turn ends with one of one or two tokens
    return Program(
        name,
        gen.generate,
        (
            player.params,
            cache,
            place.rows(rows),
            place.rows(rows),
            place.whole(keys.shape, keys.dtype),
            stop_ids,
        ),
        {
            "config": player.sizes,
            "sampling": how,
            "chunk": chunk,
            "sharded": is_sharded(player.params),
        },
        runs=runs,
        trips=chunk,
        moved=gone_through(player, cache, times=chunk, read=read),
        beside=player.beside,
    )


def gone_through(player: Player, cache: Any, *, times: int, read: float) -> tuple[Moved, ...]:
    """All of a model's weights, and the slots of its cache, of which `read` is the share read.

    Of a mixture all experts: with many rows each is asked for by some token.
    """
    params = player.params
    # Of a table that is not the head as well only single rows are read.
    used = {name: part for name, part in params.items() if name != "embed" or "head" not in params}
    return (
        Moved("parameters", device_bytes(used), times),
        Moved("cache", round(device_bytes((cache.keys, cache.values)) * read), times),
    )
