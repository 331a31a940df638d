"""Causal grouped-query attention, of a sequence over itself or of new tokens over a cache."""

from functools import partial

import jax
import jax.numpy as jnp

# The einsums for each layout of keys and values. Heads before slots ("BGSH") reads contiguously on
# CPU and GPU. TPU wants slots first, and would copy the other layout in and out of every program.
_SCORES = {"BGSH": "btgrh,bgsh->bgrts", "BSGH": "btgrh,bsgh->bgrts"}
_VALUES = {"BGSH": "bgrts,bgsh->btgrh", "BSGH": "bgrts,bsgh->btgrh"}

# Split a sequence into at most 8 spans; each attends only to keys before its end. Half of all pairs
# of query and key are masked; 8 spans skip 7/8 of those. Each span adds code to compile.
_SPANS = 8


def attention(
    q_BTNH: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_BT: jax.Array | None = None,
    *,
    layout: str,
    query_chunk: int,
) -> jax.Array:
    """softmax(q kᵀ / √H) v over the keys at or before each query, `query_chunk` queries at a time.

    Slot s of the keys holds position s, so a query attends to slots `s <= position`. Slots that
    were never written lie beyond every position and need no other mask. The backward pass
    rematerializes each chunk, so no `[T, S]` array outlives a chunk.

    Args:
      q_BTNH: queries, float [B, T, N, H], rotated.
      k: keys, rotated, in `layout`: [B, G, S, H] or [B, S, G, H]. G divides N.
      v: values, in `layout`.
      position_BT: int32 position of each query; the leading axis may be 1. None for a sequence over
        itself: positions are 0..T-1, and most masked pairs are skipped.
      layout: "BGSH" or "BSGH"; only "BSGH" without `position_BT`.
      query_chunk: queries at a time, ≥ 1; T need not be a multiple of it.

    Returns:
      [B, T, N, H] in the dtype of the queries. Scores and softmax are float32.
    """
    if position_BT is None:
        return _by_spans(q_BTNH, k, v, query_chunk=query_chunk)
    return _by_chunks(q_BTNH, k, v, position_BT, layout=layout, query_chunk=query_chunk)


def _by_spans(
    q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, *, query_chunk: int
) -> jax.Array:
    """A sequence over itself, span by span; a span is a whole number of chunks."""
    T = q_BTNH.shape[1]
    chunks = -(-T // query_chunk)
    span = -(-chunks // _SPANS) * query_chunk
    outputs = []
    for start in range(0, T, span):
        end = min(start + span, T)
        position = jnp.arange(start, end)[None]
        q, k, v = q_BTNH[:, start:end], k_BTGH[:, :end], v_BTGH[:, :end]
        outputs.append(_by_chunks(q, k, v, position, layout="BSGH", query_chunk=query_chunk))
    return jnp.concatenate(outputs, axis=1)


def _by_chunks(
    q_BTNH: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_BT: jax.Array,
    *,
    layout: str,
    query_chunk: int,
) -> jax.Array:
    """Chunk by chunk, in a loop. Unrolled, the compiler could hold the scores of many at once."""
    if q_BTNH.shape[1] <= query_chunk:
        return jax.checkpoint(partial(_at_once, layout=layout))(q_BTNH, k, v, position_BT)

    @jax.checkpoint
    def one(query: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BNH, position_B = query
        return _at_once(q_BNH[:, None], k, v, position_B[:, None], layout=layout)[:, 0]

    queries = (jnp.moveaxis(q_BTNH, 1, 0), position_BT.T)
    return jnp.moveaxis(jax.lax.map(one, queries, batch_size=query_chunk), 0, 1)


def _at_once(
    q_BTNH: jax.Array, k: jax.Array, v: jax.Array, position_BT: jax.Array, *, layout: str
) -> jax.Array:
    """The formula itself, with all scores `[B, N, T, S]` in memory."""
    B, T, N, H = q_BTNH.shape
    G = k.shape[layout.index("G")]
    S = k.shape[layout.index("S")]
    q = q_BTNH.reshape(B, T, G, N // G, H)
    scores = jnp.einsum(_SCORES[layout], q, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(S) <= position_BT[:, :, None]
    scores = jnp.where(visible[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum(_VALUES[layout], probs, v).reshape(B, T, N, H)
