"""The decoder-only transformer as pure functions over a nested dict of arrays.

One code path covers Qwen3 (RMS norm on queries and keys), Qwen2.5 (bias on the query, key and
value projections) and Llama (neither): pre-norm blocks, grouped-query attention, rotary positions,
and SwiGLU or a mixture of experts.

`forward` scans over stacked layers, so only one layer is compiled. `forward_cached` unrolls the
layers, and each has its own cache buffer: a scan would copy the cache at every step.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model import moe
from opd_jax.model.attention import attention, cached_attention
from opd_jax.model.cache import Buffer, KVCache, add_rows, append, take_rows
from opd_jax.model.params import Params, unstack
from opd_jax.model.projections import PROJECTION, projection
from opd_jax.model.sizes import ModelConfig
from opd_jax.runtime import mesh
from opd_jax.runtime.fields import check_choice
from opd_jax.runtime.mesh import DECODING, TRAINING, Rules, constrain


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in the dtype of `x`.

    It is normalized in float32, and rounded to the dtype of `x` before `weight` multiplies it, as
    in `transformers`.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequencies in radians per position, float32 [H/2]; Llama-3 scaling if configured.

    The scaling divides low frequencies (wavelength above original_max / low_freq_factor) by
    `factor` and keeps high ones. In between it interpolates linearly in original_max / wavelength.

    Source: the reference code released with Llama 3.1.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    freq = config.rope_theta**-exponent
    s = config.rope_scaling
    if s is not None:
        turns = s.original_max_positions * freq / (2 * np.pi)  # in the original context
        mix = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        mix = np.clip(mix, 0.0, 1.0)
        freq = (1 - mix) * freq / s.factor + mix * freq
    return freq.astype(np.float32)


def _rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2): the convention of Hugging Face checkpoints."""
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _qkv(
    layer: Params,
    x_BTD: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    config: ModelConfig,
    *,
    all_gather: bool,
    rules: Rules,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    project = projection(all_gather)
    x = rms_norm(x_BTD, layer["attn_norm"], config.norm_eps)
    q = project(x, layer["q"], "btd,dnh->btnh")
    k = project(x, layer["k"], "btd,dgh->btgh")
    v = project(x, layer["v"], "btd,dgh->btgh")
    if config.qkv_bias:
        q, k, v = q + layer["q_bias"], k + layer["k_bias"], v + layer["v_bias"]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.norm_eps)
        k = rms_norm(k, layer["k_norm"], config.norm_eps)
    q = constrain(q, "batch", None, "heads", None, rules=rules)
    k, v = (constrain(x, "batch", None, "kv_heads", None, rules=rules) for x in (k, v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _after_attention(
    layer: Params,
    x_BTD: jax.Array,
    mixed_BTNH: jax.Array,
    config: ModelConfig,
    *,
    all_gather: bool,
    rules: Rules,
) -> jax.Array:
    x = x_BTD + projection(all_gather)(mixed_BTNH, layer["o"], "btnh,nhd->btd")
    h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
    if config.experts is None:
        h = _feed_forward(layer, h, all_gather=all_gather, rules=rules)
    else:
        h = moe.feed_forward(layer, h, config.experts, all_gather=all_gather, rules=rules)
    return constrain(x + h, "batch", None, None, rules=rules)


def _feed_forward(layer: Params, x_BTD: jax.Array, *, all_gather: bool, rules: Rules) -> jax.Array:
    project = projection(all_gather)
    gate, up = (project(x_BTD, layer[name], "btd,df->btf") for name in ("gate", "up"))
    h = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp", rules=rules)
    return project(h, layer["down"], "btf,fd->btd")


def _embed(params: Params, tokens_BT: jax.Array, rules: Rules) -> jax.Array:
    # Otherwise the width stays sharded like the table's, over a mesh axis that the batch needs.
    return constrain(params["embed"][tokens_BT], "batch", None, None, rules=rules)


def _rotation(position_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    # Angles stay float32: bfloat16 cannot tell position 256 from 257.
    angle = position_BT[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


# --- A whole sequence: training and scoring -----------------------------------------------------


# What the backward pass rematerializes: nothing; a layer except the outputs of its projections; a
# whole layer, from its input.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "projections": partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PROJECTION)
    ),
    "layers": jax.checkpoint,
}


def forward(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    query_chunk: int,
    remat: str,
) -> jax.Array:
    """Final hidden states of whole sequences.

    Sequences are padded on the right. Attention is causal, so no real position sees the padding and
    no mask is needed.

    Args:
      tokens: int32 [B, T].
      query_chunk: queries at a time (`attention`).
      remat: what the backward pass rematerializes, a key of `REMAT`.

    Returns:
      [B, T, D], normalized: `hidden @ head(params)` are the logits.

    Raises:
      ValueError: an unknown `remat`.
    """
    check_choice(REMAT, remat=remat)
    how: dict[str, Any] = dict(all_gather=True, rules=TRAINING)
    x = _embed(params, tokens, TRAINING)
    cos, sin = _rotation(jnp.arange(tokens.shape[1])[None], config)

    def block(x_BTD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        q, k, v = _qkv(layer, x_BTD, cos, sin, config, **how)
        mixed = attention(q, k, v, query_chunk=query_chunk, implementation=config.attention)
        return _after_attention(layer, x_BTD, mixed, config, **how), None

    x, _ = jax.lax.scan(REMAT[remat](block), x, params["layers"])
    return rms_norm(x, params["final_norm"], config.norm_eps)


# --- New tokens over a cache: sampling and judging ------------------------------------------------


def forward_cached(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig,
    sharded: bool,
    rows: jax.Array | None = None,
    slots_read: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Appends ragged tokens to conversations and returns the hidden states of the new tokens.

    Row b appends its first `counts[b]` tokens. The others are not written to the cache, and their
    hidden states are meaningless. The caller ensures `lengths + counts <= slots`.

    Args:
      params: stacked, or better `unstack`ed if it is called in a loop.
      cache: the conversations so far, C rows.
      tokens: int32 [B, T].
      counts: int32 [B], 0..T.
      sharded: static, `is_sharded(params)`. If true, many tokens all-gather the weights; a few are
        sent to the weights instead (`projections.project_sharded`).
      rows: int32 [B], the cache's row of each row of tokens (`cache.take_rows`); a row that appends
        nothing may name any. None: they are the same, and B = C.
      slots_read: int32, at least the largest length after this; by default that. A loop computes it
        once, since on a mesh it is an all-reduce.

    Returns:
      ([B, T, D] normalized hidden states, the cache with the new tokens).
    """
    step = jnp.arange(tokens.shape[1])
    lengths = take_rows(cache.lengths, rows)
    if slots_read is None:
        slots_read = longest(lengths, counts)
    position_BT = lengths[:, None] + step
    # Tokens beyond the count get a slot out of range, which the scatter drops.
    slot_BT = jnp.where(step < counts[:, None], position_BT, cache.slots)
    cos, sin = _rotation(position_BT, config)
    x = _embed(params, tokens, DECODING)
    few = tokens.size <= config.d_model * mesh.shards("decode_batch", rules=DECODING)
    all_gather = not (sharded and few)
    how: dict[str, Any] = dict(all_gather=all_gather, rules=DECODING)

    def block(
        x_BTD: jax.Array, k: Buffer, v: Buffer, layer: Params
    ) -> tuple[jax.Array, Buffer, Buffer]:
        q, new_k, new_v = _qkv(layer, x_BTD, cos, sin, config, **how)
        k = append(k, new_k, slot_BT, rows=rows)
        v = append(v, new_v, slot_BT, rows=rows)
        mixed = cached_attention(
            q,
            k,
            v,
            position_BT,
            slots_read=slots_read,
            rows=rows,
            implementation=config.attention,
        )
        return _after_attention(layer, x_BTD, mixed, config, **how), k, v

    keys, values = [], []
    for layer, k, v in zip(unstack(params)["layers"], cache.keys, cache.values, strict=True):
        if sharded and all_gather:
            # Practically always true. The condition only bounds memory: without it the TPU compiler
            # holds the all-gathered weights of all layers from the start. The price: no all-gather
            # overlaps with the layer before.
            x, k, v = jax.lax.cond(
                jnp.any(counts > 0), block, lambda x, k, v, _: (x, k, v), x, k, v, layer
            )
        else:
            x, k, v = block(x, k, v, layer)
        keys.append(k)
        values.append(v)
    hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    lengths = constrain(add_rows(cache.lengths, counts, rows), "batch", rules=DECODING)
    return hidden, replace(cache, keys=tuple(keys), values=tuple(values), lengths=lengths)


def longest(lengths: jax.Array, counts: jax.Array) -> jax.Array:
    """The largest length after rows append `counts`, of those that append any; at least 1.

    An int32 scalar, for the `slots_read` of `forward_cached`.
    """
    return jnp.max(jnp.where(counts > 0, lengths + counts, 1))
