"""Causal grouped-query attention, of a sequence over itself or of new tokens over a cache."""

from functools import partial

import jax
import jax.numpy as jnp

from opd_jax.model import kernels
from opd_jax.model.cache import Buffer, Int8Slots, take_rows

# Split a sequence into at most 8 spans; each attends only to keys before its end. Half of all pairs
# of query and key are masked; 8 spans skip 7/8 of those. Each span adds code to compile.
_SPANS = 8

# Slots at a time. On a CPU 64 to 256 are equally fast.
BLOCK = 128

_MASKED = jnp.finfo(jnp.float32).min


def attention(
    q_BTNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    *,
    query_chunk: int,
    implementation: str = "plain",
) -> jax.Array:
    """softmax(q kᵀ / √H) v of a sequence over itself.

    A query attends to the keys at and before its own position. Plainly, `query_chunk` queries are
    computed at a time, and the backward pass rematerializes each chunk, so no `[T, T]` array
    outlives a chunk.

    Args:
      q_BTNH: queries, float [B, T, N, H], rotated.
      k_BTGH: keys, [B, T, G, H], rotated. G divides N.
      v_BTGH: values, [B, T, G, H].
      query_chunk: queries at a time, ≥ 1; T need not be a multiple of it. A span is a whole number
        of chunks.
      implementation: a key of `kernels.ATTENTION`; plain where its kernel cannot serve.

    Returns:
      [B, T, N, H] in the dtype of the queries. Scores and softmax are float32.
    """
    if kernel := kernels.over_itself(implementation, q_BTNH, k_BTGH):
        return kernel(q_BTNH, k_BTGH, v_BTGH)
    T = q_BTNH.shape[1]
    chunks = -(-T // query_chunk)
    span = -(-chunks // _SPANS) * query_chunk
    outputs = []
    for start in range(0, T, span):
        end = min(start + span, T)
        q, k, v = q_BTNH[:, start:end], k_BTGH[:, :end], v_BTGH[:, :end]
        position = jnp.arange(start, end)
        outputs.append(_by_chunks(q, k, v, position, query_chunk=query_chunk))
    return jnp.concatenate(outputs, axis=1)


def _by_chunks(
    q_BTNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    position_T: jax.Array,
    *,
    query_chunk: int,
) -> jax.Array:
    """Chunk by chunk, in a loop. Unrolled, the compiler could hold the scores of many at once."""
    if q_BTNH.shape[1] <= query_chunk:
        return jax.checkpoint(_at_once)(q_BTNH, k_BSGH, v_BSGH, position_T)

    @jax.checkpoint
    def one(query: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BNH, position = query
        return _at_once(q_BNH[:, None], k_BSGH, v_BSGH, position[None])[:, 0]

    queries = (jnp.moveaxis(q_BTNH, 1, 0), position_T)
    return jnp.moveaxis(jax.lax.map(one, queries, batch_size=query_chunk), 0, 1)


def _at_once(
    q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGH: jax.Array, position_T: jax.Array
) -> jax.Array:
    """The formula itself, with all scores `[B, N, T, S]` in memory."""
    B, T, N, H = q_BTNH.shape
    S, G = k_BSGH.shape[1:3]
    q = q_BTNH.reshape(B, T, G, N // G, H)
    scores = jnp.einsum("btgrh,bsgh->bgrts", q, k_BSGH, preferred_element_type=jnp.float32)
    visible = jnp.arange(S) <= position_T[:, None]
    scores = jnp.where(visible, scores * H**-0.5, _MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSGH.dtype)
    return jnp.einsum("bgrts,bsgh->btgrh", probs, v_BSGH).reshape(B, T, N, H)


def cached_attention(
    q_BTNH: jax.Array,
    k_CGSH: Buffer,
    v_CGSH: Buffer,
    position_BT: jax.Array,
    *,
    slots_read: jax.Array,
    rows: jax.Array | None = None,
    implementation: str = "plain",
) -> jax.Array:
    """softmax(q kᵀ / √H) v of new tokens over a cache.

    Slot s holds position s, so a query attends to slots `s <= position`. Plainly, a block of slots
    is read at a time, by all rows. Later blocks rescale what earlier ones gave (an online softmax).
    A block that a row does not see adds exactly 0 to it, so its result does not depend on how far
    other rows make the loop go.

    Args:
      q_BTNH: queries, float [B, T, N, H], rotated.
      k_CGSH: keys of all slots, [C, G, S, H], rotated. G divides N. The scales of an `Int8Slots`
        multiply scores, and those of values the probabilities.
      v_CGSH: values, [C, G, S, H].
      position_BT: int32 position of each query.
      slots_read: int32, the first of all slots that no query sees. It sets the number of blocks.
      rows: the cache's row of each of the B rows, int32 (`cache.take_rows`); None: they are the
        same, and B = C.
      implementation: a key of `kernels.ATTENTION`; plain where its kernel cannot serve.

    Returns:
      [B, T, N, H] in the dtype of the queries. Scores, softmax and sums are float32.

    Source: Milakov and Gimelshein, arXiv 1805.02867.
    """
    if kernel := kernels.over_a_cache(implementation, q_BTNH, k_CGSH, rows):
        # A row that is full and samples no more would read a slot too many.
        lengths = jnp.minimum(position_BT[:, 0] + 1, jax.tree.leaves(k_CGSH)[0].shape[2])
        return kernel(q_BTNH[:, 0], k_CGSH, v_CGSH, lengths)[:, None]
    B, T, N, H = q_BTNH.shape
    G, S = jax.tree.leaves(k_CGSH)[0].shape[1:3]
    M, size = T * N // G, min(BLOCK, S)
    # The M queries of a group are those of its heads, for each new token: a product with an axis of
    # its own for one token is slower on a CPU.
    q = jnp.moveaxis(q_BTNH.reshape(B, T, G, N // G, H), 2, 1).reshape(B, G, M, H)
    position_BM = jnp.repeat(position_BT, N // G, axis=1)[:, None, :, None]

    def read(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        start = jnp.minimum(block * size, S - size)  # the last block overlaps the one before
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2)
        (keys, of_keys), (values, of_values) = (
            _floats(jax.tree.map(lambda x: take_rows(part(x), rows), buffer), q.dtype)
            for buffer in (k_CGSH, v_CGSH)
        )
        scores = jnp.einsum("bgmh,bgsh->bgms", q, keys, preferred_element_type=jnp.float32)
        scores *= of_keys
        slot = start + jnp.arange(size)
        visible = (slot <= position_BM) & (slot >= block * size)
        scores = jnp.where(visible, scores * H**-0.5, _MASKED)
        higher = jnp.maximum(top, scores.max(axis=-1))
        probs, kept = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        weighed = (probs * of_values).astype(values.dtype)
        more = jnp.einsum("bgms,bgsh->bgmh", weighed, values, preferred_element_type=jnp.float32)
        return higher, total * kept + probs.sum(axis=-1), mixed * kept[..., None] + more

    nothing = jnp.zeros((B, G, M), jnp.float32)
    carry = nothing + _MASKED, nothing, jnp.zeros((B, G, M, H), jnp.float32)
    _, total, mixed = jax.lax.fori_loop(0, -(-slots_read // size), read, carry)
    mixed = (mixed / total[..., None]).astype(q.dtype).reshape(B, G, T, N // G, H)
    return jnp.moveaxis(mixed, 1, 2).reshape(B, T, N, H)


def _floats(buffer: Buffer, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Slots in a float dtype, and their scales as [B, G, 1, S]; integers are exact in bfloat16."""
    if not isinstance(buffer, Int8Slots):
        return buffer, 1.0
    return buffer.values.astype(dtype), buffer.scale[:, :, None, :]
