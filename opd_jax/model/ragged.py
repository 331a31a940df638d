"""A TPU kernel: one new token of each row over a cache, of which a row reads only what it has."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opd_jax.model.cache import Buffer, Int8Slots

# Most bytes of a block of keys. The fast memory, 16 MiB on a v5e, holds two blocks of keys and two
# of values, the one that is computed and the next, and the scores of a block.
_BLOCK_BYTES = 1 << 20
# Slots of a block: whole tiles of a TPU, also in 8 bits. The larger, the fewer steps.
_BLOCKS = (1024, 512, 256, 128)

_MASKED = jnp.finfo(jnp.float32).min


def block_of(slots: int, *, slot_bytes: int) -> int | None:
    """Slots that are read at a time: they divide a row's, and fit the fast memory. None: none do.

    `slot_bytes` are those of the keys of one slot, all heads of a device together.
    """
    fitting = (n for n in _BLOCKS if slots % n == 0 and n * slot_bytes <= _BLOCK_BYTES)
    return next(fitting, None)


def ragged_attention(
    q_BNH: jax.Array, k_BGSH: Buffer, v_BGSH: Buffer, lengths_B: jax.Array
) -> jax.Array:
    """softmax(q kᵀ / √H) v of one query a head over the first `lengths_B` slots of its row.

    Blocks of slots follow each other; later ones rescale what earlier ones gave (an online
    softmax). Past its last block a row names that block again, which is then not fetched again,
    and computes nothing.

    Args:
      q_BNH: queries, float [B, N, H], rotated.
      k_BGSH: keys [B, G, S, H]. G divides N, and there is a `block_of` them.
      v_BGSH: values, the same.
      lengths_B: int32 [B], 1..S.

    Returns:
      [B, N, H] in the dtype of the queries. Scores, softmax and sums are float32.

    Source: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135.
    """
    B, N, H = q_BNH.shape
    values = jax.tree.leaves(k_BGSH)[0]
    G, S = values.shape[1:3]
    R, block = N // G, block_of(S, slot_bytes=G * H * values.dtype.itemsize)
    assert block  # as `kernels.over_a_cache` checks

    def of_row(row: Any, step: Any, lengths: Any) -> tuple[Any, ...]:
        return row, 0, 0, 0

    def slots(row: Any, step: Any, lengths: Any) -> tuple[Any, ...]:
        # `//` of integers that may be negative asks which TPU this is, also where there is none.
        return row, 0, jnp.minimum(step, jax.lax.div(lengths[row] - 1, block)), 0

    def buffer(x: Buffer) -> Any:
        floats = pl.BlockSpec((1, G, block, H), slots)
        scale = pl.BlockSpec((1, G, block), lambda *at: slots(*at)[:3])
        return Int8Slots(floats, scale) if isinstance(x, Int8Slots) else floats

    heads = pl.BlockSpec((1, G, R, H), of_row)
    mixed = pl.pallas_call(
        partial(_step, block=block, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, S // block),
            in_specs=[heads, buffer(k_BGSH), buffer(v_BGSH)],
            out_specs=heads,
            scratch_shapes=[pltpu.VMEM((G, R, width), jnp.float32) for width in (1, 1, H)],
        ),
        out_shape=jax.ShapeDtypeStruct((B, G, R, H), q_BNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="ragged_attention",
    )(lengths_B, q_BNH.reshape(B, G, R, H), k_BGSH, v_BGSH)
    return mixed.reshape(B, N, H)


def _step(
    lengths: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    top: Any,
    total: Any,
    mixed: Any,
    *,
    block: int,
    scale: float,
) -> None:
    """One block of slots of one row; the scratch arrays carry the softmax to the next block."""
    length, step = lengths[pl.program_id(0)], pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, _MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    @pl.when(step * block < length)
    def _() -> None:
        for g in range(q.shape[1]):
            queries = q[0, g]
            keys, of_keys = _slots(k, g, queries.dtype)
            values, of_values = _slots(v, g, queries.dtype)
            scores = _dot(queries, keys, ((1,), (1,))) * of_keys * scale  # [R, block]
            slot = step * block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(slot < length, scores, _MASKED)
            higher = jnp.maximum(top[g], scores.max(axis=1, keepdims=True))
            probs, kept = jnp.exp(scores - higher), jnp.exp(top[g] - higher)
            top[g] = higher
            total[g] = total[g] * kept + probs.sum(axis=1, keepdims=True)
            weighed = (probs * of_values).astype(queries.dtype)
            mixed[g] = mixed[g] * kept + _dot(weighed, values, ((1,), (0,)))

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        out[0] = (mixed[...] / total[...]).astype(out.dtype)


def _slots(ref: Any, g: int, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    """A head's slots in a float dtype, [block, H], and their scales [1, block]."""
    if isinstance(ref, Int8Slots):
        return ref.values[0, g].astype(dtype), ref.scale[0, g : g + 1]
    return ref[0, g], 1.0


def _dot(a: jax.Array, b: jax.Array, contracted: Any) -> jax.Array:
    wide = jnp.promote_types(a.dtype, b.dtype)
    return jax.lax.dot_general(
        a.astype(wide),
        b.astype(wide),
        (contracted, ((), ())),
        preferred_element_type=jnp.float32,
    )
