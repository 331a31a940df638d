"""Causal grouped-query attention, over a sequence or over a cache."""

from functools import partial

import jax
import jax.numpy as jnp

# Where the cache keeps its slots. Heads first reads contiguously on CPU and GPU; TPU wants slots
# first, and copies the other layout in and out of every program.
_SCORES = {"BGSH": "btgrh,bgsh->bgrts", "BSGH": "btgrh,bsgh->bgrts"}
_VALUES = {"BGSH": "bgrts,bgsh->btgrh", "BSGH": "bgrts,bsgh->btgrh"}


def attention(
    q_BTNH: jax.Array, k: jax.Array, v: jax.Array, position_BT: jax.Array, *, layout: str
) -> jax.Array:
    """Causal grouped-query attention of queries at `position_BT` over slots 0..S-1.

    Slot s holds the key of position s, so the mask is `s <= position`; slots never written lie
    beyond every position and need no mask of their own.

    Args:
      q_BTNH: queries.
      k: keys, in `layout`: "BGSH" or "BSGH".
      v: values, in `layout`.
      position_BT: int32 position of each query; the leading axis may be 1.

    Returns:
      [B, T, N, H] in the dtype of the queries. Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    G = k.shape[layout.index("G")]
    S = k.shape[layout.index("S")]
    q = q_BTNH.reshape(B, T, G, N // G, H)
    scores = jnp.einsum(_SCORES[layout], q, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(S) <= position_BT[:, :, None]
    scores = jnp.where(visible[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum(_VALUES[layout], probs, v).reshape(B, T, N, H)


# Into at most so many spans a sequence is cut, each with keys of its own length: a program to
# compile for each, for an eighth of the masked half of the work that the last cut would save.
_SPANS = 8


def causal_self_attention(
    q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, *, query_chunk: int
) -> jax.Array:
    """Attention of a sequence over itself, `query_chunk` queries at a time.

    A span of chunks sees only the keys up to its own end, which skips most of the masked half of
    the work, and each chunk is rematerialized in the backward pass, so no `[T, T]` array outlives
    a chunk.

    Args:
      q_BTNH: float [B, T, N, H], rotated.
      k_BTGH: float [B, T, G, H], rotated.
      v_BTGH: float [B, T, G, H].
      query_chunk: queries at a time, ≥ 1; T need not divide by it.

    Returns:
      [B, T, N, H] in the dtype of the queries.
    """
    T = q_BTNH.shape[1]
    chunks = -(-T // query_chunk)
    span = -(-chunks // _SPANS) * query_chunk
    outputs = []
    for start in range(0, T, span):
        end = min(start + span, T)
        here, before = slice(start, end), slice(0, end)
        position = jnp.arange(start, end)[None]
        outputs.append(
            chunked_attention(
                q_BTNH[:, here],
                k_BTGH[:, before],
                v_BTGH[:, before],
                position,
                layout="BSGH",
                query_chunk=query_chunk,
            )
        )
    return jnp.concatenate(outputs, axis=1)


def chunked_attention(
    q_BTNH: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_BT: jax.Array,
    *,
    layout: str,
    query_chunk: int,
) -> jax.Array:
    """`attention`, `query_chunk` queries at a time, each chunk rematerialized in a backward pass.

    In a loop, not a list of pieces: those the compiler may compute side by side.

    Args:
      q_BTNH: queries, rotated.
      k: keys, in `layout`.
      v: values, in `layout`.
      position_BT: int32 position of each query; the leading axis may be 1.
      layout: "BGSH" or "BSGH".
      query_chunk: queries at a time, ≥ 1.

    Returns:
      [B, T, N, H] in the dtype of the queries.
    """
    if q_BTNH.shape[1] <= query_chunk:
        return jax.checkpoint(partial(attention, layout=layout))(q_BTNH, k, v, position_BT)

    @jax.checkpoint
    def one(query: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BNH, position_B = query
        return attention(q_BNH[:, None], k, v, position_B[:, None], layout=layout)[:, 0]

    queries = (jnp.moveaxis(q_BTNH, 1, 0), position_BT.T)
    return jnp.moveaxis(jax.lax.map(one, queries, batch_size=query_chunk), 0, 1)
