"""A model as pure functions: ours, those of a `ModelConfig`, or anybody's.

The learner calls `hidden` and `head` alone. A rollout calls `append` and `init_cache`; it takes a
`ModelConfig` as well, which also samples on meshes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.model.cache import init_cache
from opd_jax.model.params import Params, head
from opd_jax.model.sizes import ModelConfig
from opd_jax.model.transformer import forward, forward_cached


@dataclass(frozen=True)
class Model:
    """A language model of any architecture; static under `jit`. Its parameters are any pytree.

    A function is known by its identity, so make one `Model` and keep it: one with other lambdas
    compiles again.

    Attributes:
      hidden: `(params, tokens) -> [B, T, D]`, the states of whole sequences, int32 [B, T]. State t
        depends on the tokens up to t and predicts token t + 1. Padding is on the right.
      head: `params -> [D, V]`; the logits are `hidden @ head`.
      init_cache: `(params, rows, slots) -> cache`, for so many conversations of at most so many
        tokens: a pytree whose arrays have the rows for first axis. None: it does not sample.
      append: `(params, cache, lengths, tokens, counts) -> (hidden, cache)`, the states [B, T, D] of
        new tokens, int32 [B, T], behind the `lengths[b]` that a row has. Row b appends its first
        `counts[b]`; the others leave no trace. Where `lengths[b]` is 0 the row is empty, and what
        the cache holds of it is another conversation's.
      unused_ids: ranges [start, stop) of ids that are never sampled.
    """

    hidden: Callable[[Any, jax.Array], jax.Array]
    head: Callable[[Any], jax.Array]
    init_cache: Callable[[Any, int, int], Any] | None = None
    append: Callable[..., tuple[jax.Array, Any]] | None = None
    unused_ids: tuple[tuple[int, int], ...] = ()


@struct.dataclass
class Kept:
    """The cache of a `Model`, and how many tokens each row has, int32 [B]."""

    cache: Any
    lengths: jax.Array


def functions_of(config: ModelConfig, *, query_chunk: int, remat: str) -> Model:
    """The transformer as the learner calls it; arguments as in `forward`."""
    hidden = partial(forward, config=config, query_chunk=query_chunk, remat=remat)
    return Model(hidden=hidden, head=head, unused_ids=config.unused_ids)


def head_of(config: ModelConfig | Model) -> Callable[[Any], jax.Array]:
    """The function `params -> [D, V]`."""
    return config.head if isinstance(config, Model) else head


def empty_cache(
    params: Params, *, config: ModelConfig | Model, rows: int, slots: int, int8: bool
) -> Any:
    """An empty cache; ours has the dtype of the parameters, or 8 bits with `int8`.

    Raises:
      ValueError: a `Model` does not sample, or is asked for what only a `ModelConfig` does.
    """
    if isinstance(config, ModelConfig):
        dtype = params["embed"].dtype
        return init_cache(config, batch=rows, slots=slots, dtype=dtype, int8=int8)
    if config.init_cache is None or config.append is None:
        raise ValueError("a `Model` samples with `init_cache` and `append`: give both, got None")
    if int8:
        raise ValueError(
            "`int8_cache`: a `Model` has a cache of its own, so expected False, got True"
        )
    if (devices := jax.sharding.get_abstract_mesh().size) > 1:
        raise ValueError(
            f"a `Model` samples on one device: expected no mesh or one of 1 device, got {devices}"
        )
    return Kept(config.init_cache(params, rows, slots), jnp.zeros(rows, jnp.int32))


def append(
    params: Params,
    cache: Any,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig | Model,
    rows: jax.Array | None = None,
    **how: Any,
) -> tuple[jax.Array, Any]:
    """`forward_cached`, or the `append` of a `Model`, for which `how` has no meaning."""
    if isinstance(config, ModelConfig):
        return forward_cached(params, cache, tokens, counts, config=config, rows=rows, **how)
    assert config.append is not None  # as `empty_cache` checks
    of = cache if rows is None else jax.tree.map(lambda x: x[rows], cache)
    hidden, grown = config.append(params, of.cache, of.lengths, tokens, counts)
    grown = Kept(grown, of.lengths + counts)
    if rows is None:
        return hidden, grown
    # A row that appends nothing may name one that does: it is not written.
    place = jnp.where(counts > 0, rows, len(cache.lengths))
    return hidden, jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), cache, grown)
