"""The decoder-only transformer as pure functions over a nested dict of arrays.

One code path covers Qwen3 (RMS norm on queries and keys), Qwen2.5 (bias on the query, key and
value projections) and Llama (neither): pre-norm blocks, grouped-query attention, rotary positions,
SwiGLU, or a mixture of experts (`moe`).

`forward` scans over stacked layers, which compiles one layer. `forward_cached` unrolls them over
per-layer cache buffers: a cache carried through a scan would be copied at every step.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model import moe
from opd_jax.model.attention import causal_self_attention, chunked_attention
from opd_jax.model.cache import KVCache, append
from opd_jax.model.params import Params
from opd_jax.model.projections import PROJECTION, projection
from opd_jax.model.sizes import ModelConfig
from opd_jax.runtime import mesh
from opd_jax.runtime.mesh import constrain


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis; normalized in float32.

    Args:
      x: float [..., D].
      weight: float [D].
      eps: added to the mean square.

    Returns:
      [..., D]: what was normalized is rounded to the dtype of `x` before it is weighted.

    Source: Zhang and Sennrich, arXiv 1910.07467; the order of rounding is that of `transformers`.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequencies `[H/2]`, radians a position; Llama-3 scaling where configured.

    Low frequencies (wavelength above original_max / low_freq_factor) are divided by `factor`, high
    ones kept, and those between interpolated linearly in original_max / wavelength.
    Source: the reference code released with Llama 3.1.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    freq = config.rope_theta**-exponent
    s = config.rope_scaling
    if s is not None:
        turns = s.original_max_positions * freq / (2 * np.pi)  # over the original context
        mix = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        mix = np.clip(mix, 0.0, 1.0)
        freq = (1 - mix) * freq / s.factor + mix * freq
    return freq.astype(np.float32)


def _rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
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
    keep_sharded: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    project = projection(keep_sharded)
    x = rms_norm(x_BTD, layer["attn_norm"], config.norm_eps)
    q = project(x, layer["q"], "btd,dnh->btnh")
    k = project(x, layer["k"], "btd,dgh->btgh")
    v = project(x, layer["v"], "btd,dgh->btgh")
    if config.qkv_bias:
        q, k, v = q + layer["q_bias"], k + layer["k_bias"], v + layer["v_bias"]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.norm_eps)
        k = rms_norm(k, layer["k_norm"], config.norm_eps)
    q = constrain(q, "batch", None, "heads", None)
    k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _after_attention(
    layer: Params,
    x_BTD: jax.Array,
    mixed_BTNH: jax.Array,
    config: ModelConfig,
    keep_sharded: bool,
) -> jax.Array:
    x = x_BTD + projection(keep_sharded)(mixed_BTNH, layer["o"], "btnh,nhd->btd")
    h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
    if config.experts is None:
        h = _feed_forward(layer, h, keep_sharded)
    else:
        h = moe.feed_forward(layer, h, config.experts, keep_sharded=keep_sharded)
    return constrain(x + h, "batch", None, None)


def _feed_forward(layer: Params, x_BTD: jax.Array, keep_sharded: bool) -> jax.Array:
    project = projection(keep_sharded)
    gate, up = (project(x_BTD, layer[name], "btd,df->btf") for name in ("gate", "up"))
    h = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
    return project(h, layer["down"], "btf,fd->btd")


def _embed(params: Params, tokens_BT: jax.Array) -> jax.Array:
    # Else the width would stay split as the table's is, over an axis that the batch needs.
    return constrain(params["embed"][tokens_BT], "batch", None, None)


def _rotation(position_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    # Angles stay float32: bfloat16 cannot tell position 256 from 257.
    angle = position_BT[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


# --- A whole sequence: training and scoring -----------------------------------------------------


# What is kept for the backward pass, by name: everything; of each layer its input and what its
# projections gave; of each layer its input alone.
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

    Sequences are padded on the right: causality keeps padding out of every real position, so there
    is no mask, and whatever stands in the padding cannot change a real position.

    Args:
      tokens: int32 [B, T].
      query_chunk: queries attended at a time (`causal_self_attention`).
      remat: what the backward pass finds and what it computes again (`REMAT`).

    Returns:
      [B, T, D], normalized: `hidden @ head(params)` are the logits.

    Raises:
      ValueError: an unknown `remat`.
    """
    if remat not in REMAT:
        raise ValueError(f"`remat`: expected one of {', '.join(REMAT)}, got {remat!r}")
    x = _embed(params, tokens)
    cos, sin = _rotation(jnp.arange(tokens.shape[1])[None], config)

    def block(x_BTD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        q, k, v = _qkv(layer, x_BTD, cos, sin, config, keep_sharded=False)
        mixed = causal_self_attention(q, k, v, query_chunk=query_chunk)
        return _after_attention(layer, x_BTD, mixed, config, keep_sharded=False), None

    x, _ = jax.lax.scan(REMAT[remat](block), x, params["layers"])
    return rms_norm(x, params["final_norm"], config.norm_eps)


# Queries scored against a cache at a time: the scores of a long prefill, [B, N, T, S] in float32,
# would be larger than the cache.
_CACHED_QUERIES = 128


def forward_cached(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig,
    sharded: bool,
) -> tuple[jax.Array, KVCache]:
    """Append ragged tokens to the conversations and return their hidden states.

    Row b appends its first `counts[b]` tokens; the others are dropped on write and their hidden
    states are meaningless. The caller keeps `lengths + counts <= slots`.

    Args:
      tokens: int32 [B, T].
      counts: int32 [B], 0..T.
      sharded: static, `is_sharded` of the parameters. Then few tokens are sent to the weights, and
        for many the weights are all-gathered (`projections.project_sharded`).

    Returns:
      ([B, T, D] normalized hidden states, the grown cache).
    """
    step = jnp.arange(tokens.shape[1])
    position_BT = cache.lengths[:, None] + step
    # Out of range on purpose where nothing is to be written: the scatter drops those.
    slot_BT = jnp.where(step < counts[:, None], position_BT, cache.slots)
    cos, sin = _rotation(position_BT, config)
    x = _embed(params, tokens)
    keep_sharded = sharded and tokens.size <= config.d_model * mesh.shards("decode_batch")

    def block(
        x_BTD: jax.Array, k: jax.Array, v: jax.Array, layer: Params
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, new_k, new_v = _qkv(layer, x_BTD, cos, sin, config, keep_sharded)
        k = append(k, new_k, slot_BT, cache.layout)
        v = append(v, new_v, slot_BT, cache.layout)
        mixed = chunked_attention(
            q, k, v, position_BT, layout=cache.layout, query_chunk=_CACHED_QUERIES
        )
        return _after_attention(layer, x_BTD, mixed, config, keep_sharded), k, v

    def unchanged(
        x_BTD: jax.Array, k: jax.Array, v: jax.Array, _: Params
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return x_BTD, k, v

    keys, values = [], []
    for index, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        layer = jax.tree.map(lambda p, i=index: p[i], params["layers"])
        if sharded and not keep_sharded:
            # As good as always true, but what is computed under a condition is allocated under it:
            # the TPU compiler would hold the gathered products of all layers from the very start.
            # The price: no layer's weights are gathered while the one before computes.
            x, k, v = jax.lax.cond(jnp.any(counts > 0), block, unchanged, x, k, v, layer)
        else:
            x, k, v = block(x, k, v, layer)
        keys.append(k)
        values.append(v)
    hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    lengths = constrain(cache.lengths + counts, "batch")
    return hidden, replace(cache, keys=tuple(keys), values=tuple(values), lengths=lengths)
