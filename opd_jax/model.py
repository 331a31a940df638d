"""The decoder-only transformer as pure functions over a nested dict of arrays.

One code path covers Qwen3 (RMS norm on queries and keys), Qwen2.5 (bias on the query, key and
value projections) and Llama (neither): pre-norm blocks, grouped-query attention, rotary positions,
SwiGLU, or a mixture of experts of it (`moe`).

Axes, declared once for the package:
  `B` trajectories · `T` tokens · `K` turns · `V` vocabulary · `D` width · `N` query heads
  `G` key/value heads · `H` head size · `F` feed-forward width · `S` cache slots · `L` layers

Parameters are stacked over layers (`[L, ...]`): training scans over them, which compiles one layer;
decoding unrolls them over per-layer cache buffers, because a cache carried through a scan is
copied at every step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax import mesh, moe
from opd_jax.linear import PROJECTION, projection
from opd_jax.mesh import check_divides, constrain

Params = dict


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling: wavelengths beyond the original context are stretched.

    Attributes:
      factor: by which low frequencies are divided.
      low_freq_factor: a wavelength above `original_max_positions` / this is of a low frequency.
      high_freq_factor: one below `original_max_positions` / this is of a high frequency, and kept.
      original_max_positions: longest sequence before the context was lengthened.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; static under `jit`.

    Attributes:
      vocab_size: V, rows of the embedding.
      d_model: D, width of the residual stream.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: G, key/value heads; divides N.
      head_dim: H, size of a head, even.
      d_ff: F, width of the feed-forward layer.
      norm_eps: added to the mean square in every RMS norm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: of those frequencies; None for none.
      qk_norm: RMS norm on each query and key head before the rotation (Qwen3).
      qkv_bias: bias on the query, key and value projections (Qwen2.5).
      tied: the output head is the transposed embedding.
      max_positions: longest sequence the model was trained for.
      experts: in the place of the dense feed-forward layer of width `d_ff`; None where it is.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    qk_norm: bool
    qkv_bias: bool
    tied: bool
    experts: moe.Experts | None = None


class ParamSpec(NamedTuple):
    """One array before it exists: its shape, its logical axes and its initial scale.

    Attributes:
      axes: a logical name for each dimension; `mesh.RULES` maps names to mesh axes.
      scale: standard deviation of the normal initializer; 0 gives zeros, and `None` ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scale: float | None


def is_spec(leaf: object) -> bool:
    """True for a `ParamSpec`, which is itself a tuple and would else be flattened as a tree."""
    return isinstance(leaf, ParamSpec)


def param_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec`: the one place where a parameter's shape is written down."""
    c = config
    L, D, N, G, H, F = c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.d_ff
    std = 0.02 if D >= 400 else 1 / math.sqrt(D)
    out = std / math.sqrt(2 * L)  # residual branches start small, so depth does not grow variance
    layers = {
        "attn_norm": ParamSpec((L, D), ("layer", "embed"), None),
        "q": ParamSpec((L, D, N, H), ("layer", "embed", "heads", "head_dim"), std),
        "k": ParamSpec((L, D, G, H), ("layer", "embed", "kv_heads", "head_dim"), std),
        "v": ParamSpec((L, D, G, H), ("layer", "embed", "kv_heads", "head_dim"), std),
        "o": ParamSpec((L, N, H, D), ("layer", "heads", "head_dim", "embed"), out),
        "mlp_norm": ParamSpec((L, D), ("layer", "embed"), None),
    }
    if c.experts is None:
        layers["gate"] = ParamSpec((L, D, F), ("layer", "embed", "mlp"), std)
        layers["up"] = ParamSpec((L, D, F), ("layer", "embed", "mlp"), std)
        layers["down"] = ParamSpec((L, F, D), ("layer", "mlp", "embed"), out)
    else:
        E, F = c.experts.count, c.experts.d_ff
        layers["router"] = ParamSpec((L, D, E), ("layer", "embed", "expert"), std)
        in_axes, out_axes = ("embed", "mlp"), ("mlp", "embed")
        layers["expert_gate"] = ParamSpec((L, E, D, F), ("layer", "expert", *in_axes), std)
        layers["expert_up"] = ParamSpec((L, E, D, F), ("layer", "expert", *in_axes), std)
        layers["expert_down"] = ParamSpec((L, E, F, D), ("layer", "expert", *out_axes), out)
    if c.qk_norm:
        layers["q_norm"] = ParamSpec((L, H), ("layer", "head_dim"), None)
        layers["k_norm"] = ParamSpec((L, H), ("layer", "head_dim"), None)
    if c.qkv_bias:
        layers["q_bias"] = ParamSpec((L, N, H), ("layer", "heads", "head_dim"), 0.0)
        layers["k_bias"] = ParamSpec((L, G, H), ("layer", "kv_heads", "head_dim"), 0.0)
        layers["v_bias"] = ParamSpec((L, G, H), ("layer", "kv_heads", "head_dim"), 0.0)
    specs = {
        "embed": ParamSpec((c.vocab_size, D), ("vocab", "embed"), std),
        "layers": layers,
        "final_norm": ParamSpec((D,), ("embed",), None),
    }
    if not c.tied:
        specs["head"] = ParamSpec((D, c.vocab_size), ("embed", "vocab"), std)
    return specs


def init_params(config: ModelConfig, rng: jax.Array, *, dtype: jnp.dtype) -> Params:
    """Random parameters. Jit with `out_shardings` to make each one where it will live.

    Args:
      config: sizes.
      rng: a PRNG key, of which each parameter gets one of its own.
      dtype: of the parameters; drawn in float32.

    Returns:
      The tree of `param_specs`, an array in the place of each spec: normal with the spec's standard
      deviation, ones where that is None.
    """
    return init_arrays(param_specs(config), rng, dtype=dtype)


def init_arrays(specs: Params, rng: jax.Array, *, dtype: jnp.dtype) -> Params:
    """`init_params` of any tree of `ParamSpec`."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(rng, len(leaves))
    arrays = [_init_leaf(spec, key, dtype) for spec, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def _init_leaf(spec: ParamSpec, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if spec.scale is None:
        return jnp.ones(spec.shape, dtype)
    return (jax.random.normal(key, spec.shape) * spec.scale).astype(dtype)


def head(params: Params) -> jax.Array:
    """The output projection `[D, V]`: the transposed embedding where the two are tied."""
    return params["head"] if "head" in params else params["embed"].T


def logits(params: Params, hidden: jax.Array, *, split: bool) -> jax.Array:
    """`hidden @ head(params)` of a few tokens, float32 [B, ..., V].

    Args:
      hidden: [B, ..., D].
      split: `is_split` of the parameters. Then hidden states come to the head.
    """
    if split:
        hidden = constrain(hidden, "rows", *(None,) * (hidden.ndim - 2), "embed")
    product = jnp.matmul(hidden, head(params), preferred_element_type=jnp.float32)
    return constrain(product, "batch", *(None,) * (hidden.ndim - 2), "vocab")


def is_split(params: Params) -> bool:
    """Whether each device has a part of every weight's width, as parameters are loaded.

    Else they are whole along the mesh axis `fsdp` (`generate.sampling_params`).
    """
    return mesh.is_split(params["embed"], "embed")


# --- Layers -----------------------------------------------------------------------------------


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


# Where the cache keeps its slots. Heads first reads contiguously on CPU and GPU; TPU wants slots
# first, and copies the other layout in and out of every program.
_SCORES = {"BGSH": "btgrh,bgsh->bgrts", "BSGH": "btgrh,bsgh->bgrts"}
_VALUES = {"BGSH": "bgrts,bgsh->btgrh", "BSGH": "bgrts,bsgh->btgrh"}
_CACHE_AXES = {"B": "batch", "G": "kv_heads", "S": "slots", "H": "head_dim"}


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


def _qkv(
    layer: Params,
    x_BTD: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    config: ModelConfig,
    stationary: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    project = projection(stationary)
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
    stationary: bool,
) -> jax.Array:
    x = x_BTD + projection(stationary)(mixed_BTNH, layer["o"], "btnh,nhd->btd")
    h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
    if config.experts is None:
        h = _feed_forward(layer, h, stationary)
    else:
        h = moe.feed_forward(layer, h, config.experts, stationary=stationary)
    return constrain(x + h, "batch", None, None)


def _feed_forward(layer: Params, x_BTD: jax.Array, stationary: bool) -> jax.Array:
    project = projection(stationary)
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
        q, k, v = _qkv(layer, x_BTD, cos, sin, config, stationary=False)
        mixed = causal_self_attention(q, k, v, query_chunk=query_chunk)
        return _after_attention(layer, x_BTD, mixed, config, stationary=False), None

    x, _ = jax.lax.scan(REMAT[remat](block), x, params["layers"])
    return rms_norm(x, params["final_norm"], config.norm_eps)


# --- A growing conversation: the cache ------------------------------------------------------------


@struct.dataclass
class KVCache:
    """Keys and values of B conversations that grow turn by turn.

    The slot of a token is its position, so rows of different lengths need no padding and rolling a
    row back is lowering its length: what lies beyond is masked, then overwritten.

    Attributes:
      keys: L buffers in `layout`, [B, G, S, H] or [B, S, G, H].
      values: the same.
      lengths: int32 [B], tokens held by each row.
      layout: static; "BGSH" or "BSGH".
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    layout: str = struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        """Slots a row, `S`."""
        return self.keys[0].shape[self.layout.index("S")]


def cache_layout(platform: str) -> str:
    """The layout that a platform, as JAX calls it, reads without copies (see `_SCORES`)."""
    return "BSGH" if platform == "tpu" else "BGSH"


def backend_cache_layout() -> str:
    """`cache_layout` of the current backend."""
    return cache_layout(jax.default_backend())


def cache_specs(config: ModelConfig, *, batch: int, slots: int, layout: str) -> ParamSpec:
    """Shape and logical axes of one layer's keys, or values."""
    sizes = {"B": batch, "G": config.num_kv_heads, "S": slots, "H": config.head_dim}
    shape = tuple(sizes[axis] for axis in layout)
    return ParamSpec(shape, tuple(_CACHE_AXES[axis] for axis in layout), 0.0)


@partial(jax.jit, static_argnames=("config", "batch", "slots", "dtype", "layout"))
def init_cache(
    config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype, layout: str
) -> KVCache:
    """An empty cache of `batch` rows with `slots` slots each, split over the current mesh.

    Raises:
      ValueError: the rows, or the heads, do not divide over the mesh.
    """
    spec = cache_specs(config, batch=batch, slots=slots, layout=layout)
    check_divides({"cache": spec})

    def buffers() -> tuple[jax.Array, ...]:
        empty = (jnp.zeros(spec.shape, dtype) for _ in range(config.num_layers))
        return tuple(constrain(buffer, *spec.axes) for buffer in empty)

    lengths = constrain(jnp.zeros(batch, jnp.int32), "batch")
    return KVCache(buffers(), buffers(), lengths, layout)


def grow_cache(cache: KVCache, *, slots: int) -> KVCache:
    """The same conversations in a cache of `slots` slots, at least as many as it has.

    Buffer after buffer, each deleted when its successor is there: of all of them together there
    are never two. So `cache` is lost, as if donated.
    """

    def grown(buffer: jax.Array) -> jax.Array:
        wider = _widened(buffer, slots=slots, layout=cache.layout)
        buffer.delete()
        return wider

    keys, values = (tuple(map(grown, part)) for part in (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)


@partial(jax.jit, static_argnames=("slots", "layout"))
def _widened(buffer: jax.Array, *, slots: int, layout: str) -> jax.Array:
    axis = layout.index("S")
    padding = [(0, slots - buffer.shape[axis] if n == axis else 0) for n in range(buffer.ndim)]
    return constrain(jnp.pad(buffer, padding), *(_CACHE_AXES[name] for name in layout))


def _append(buffer: jax.Array, new_BTGH: jax.Array, slot_BT: jax.Array, layout: str) -> jax.Array:
    row = jnp.arange(buffer.shape[0])[:, None]
    if layout == "BSGH":
        grown = buffer.at[row, slot_BT].set(new_BTGH, mode="drop")
    else:
        group = jnp.arange(buffer.shape[1])
        grown = buffer.at[row[..., None], group, slot_BT[..., None]].set(new_BTGH, mode="drop")
    # As the donated buffer is, so that it is written in place.
    return constrain(grown, *(_CACHE_AXES[axis] for axis in layout))


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
    split: bool,
) -> tuple[jax.Array, KVCache]:
    """Append ragged tokens to the conversations and return their hidden states.

    Row b appends its first `counts[b]` tokens; the others are dropped on write and their hidden
    states are meaningless. The caller keeps `lengths + counts <= slots`.

    Args:
      tokens: int32 [B, T].
      counts: int32 [B], 0..T.
      split: static, `is_split` of the parameters. Then few tokens come to the weights, and weights
        are gathered for many (`linear.project_in_place`).

    Returns:
      ([B, T, D] normalized hidden states, the grown cache).
    """
    step = jnp.arange(tokens.shape[1])
    position_BT = cache.lengths[:, None] + step
    # Out of range on purpose where nothing is to be written: the scatter drops those.
    slot_BT = jnp.where(step < counts[:, None], position_BT, cache.slots)
    cos, sin = _rotation(position_BT, config)
    x = _embed(params, tokens)
    stationary = split and tokens.size <= config.d_model * mesh.split_ways("rows")

    def block(
        x_BTD: jax.Array, k: jax.Array, v: jax.Array, layer: Params
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, new_k, new_v = _qkv(layer, x_BTD, cos, sin, config, stationary)
        k = _append(k, new_k, slot_BT, cache.layout)
        v = _append(v, new_v, slot_BT, cache.layout)
        mixed = chunked_attention(
            q, k, v, position_BT, layout=cache.layout, query_chunk=_CACHED_QUERIES
        )
        return _after_attention(layer, x_BTD, mixed, config, stationary), k, v

    def unchanged(
        x_BTD: jax.Array, k: jax.Array, v: jax.Array, _: Params
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return x_BTD, k, v

    keys, values = [], []
    for index, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        layer = jax.tree.map(lambda p, i=index: p[i], params["layers"])
        if split and not stationary:
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
