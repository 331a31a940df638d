"""The parameter tree: shapes, logical axes, and initialization.

The tree is a nested dict of arrays. Those of layers are stacked, `[L, ...]`, to scan over them;
`unstack` makes a tree for each layer, to sample with.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.sizes import ModelConfig
from opd_jax.runtime import mesh
from opd_jax.runtime.mesh import DECODING, constrain

Params = dict


class ParamSpec(NamedTuple):
    """One array before it exists: its shape, its logical axes and its initial scale.

    Attributes:
      shape: sizes of the dimensions.
      axes: a logical name for each dimension; `mesh.TRAINING` and `mesh.DECODING` map them to
        mesh axes.
      scale: standard deviation of the normal initializer; 0 gives zeros, None gives ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scale: float | None


def is_spec(leaf: object) -> bool:
    """True for a `ParamSpec`. It is a tuple, so `jax.tree` needs this to treat it as a leaf."""
    return isinstance(leaf, ParamSpec)


def param_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec`, the only place that defines the shapes of parameters.

    Raises:
      ValueError: it is another model than ours, of which no shape is known.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(
            "adapters, int8 weights, sharding by our rules and export need the parameters of a "
            f"`ModelConfig`, got a `{type(config).__name__}`"
        )
    c = config
    L, D, N, G, H, F = c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.d_ff
    std = 0.02 if D >= 400 else 1 / math.sqrt(D)
    out = std / math.sqrt(2 * L)  # small residual branches: depth does not increase the variance
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
    """Random parameters: the tree of `param_specs` with an array for each spec.

    Jit with `out_shardings` to create each shard on its own device. Arrays are drawn in float32,
    then cast to `dtype`.
    """
    return init_arrays(param_specs(config), rng, dtype=dtype)


def init_arrays(specs: Params, rng: jax.Array, *, dtype: jnp.dtype) -> Params:
    """`init_params` for any tree of `ParamSpec`."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(rng, len(leaves))
    arrays = [_init_leaf(spec, key, dtype) for spec, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def _init_leaf(spec: ParamSpec, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if spec.scale is None:
        return jnp.ones(spec.shape, dtype)
    return (jax.random.normal(key, spec.shape) * spec.scale).astype(dtype)


def unstack(params: Params) -> Params:
    """The parameters with a tree for each layer, in a tuple; itself if they are so already.

    It takes trees of arrays, and of specs. Sampling wants it: a slice of stacked weights would be
    copied for every token.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params

    def of_layer(index: int) -> Params:
        return jax.tree.map(
            lambda leaf: (
                ParamSpec(leaf.shape[1:], leaf.axes[1:], leaf.scale)
                if is_spec(leaf)
                else leaf[index]
            ),
            layers,
            is_leaf=is_spec,
        )

    first = jax.tree.leaves(layers, is_leaf=is_spec)[0]
    return params | {"layers": tuple(map(of_layer, range(first.shape[0])))}


def head(params: Params) -> jax.Array:
    """The output projection `[D, V]`; for tied weights, the transposed embedding."""
    return params["head"] if "head" in params else params["embed"].T


def head_params(params: Params) -> Params:
    """The part of the parameters that `head` reads."""
    key = "head" if "head" in params else "embed"
    return {key: params[key]}


def logits(
    params: Params,
    hidden: jax.Array,
    *,
    sharded: bool,
    head: Callable[[Params], jax.Array] = head,
) -> jax.Array:
    """`hidden @ head(params)` of a few tokens, float32 [B, ..., V].

    Args:
      hidden: [B, ..., D].
      sharded: static, `is_sharded(params)`. If true, hidden states go to the shards of the head;
        the head is not all-gathered.
    """
    rest = (None,) * (hidden.ndim - 2)
    if sharded:
        hidden = constrain(hidden, "decode_batch", *rest, "embed", rules=DECODING)
    product = jnp.matmul(hidden, head(params), preferred_element_type=jnp.float32)
    return constrain(product, "batch", *rest, "vocab", rules=DECODING)


def is_sharded(params: Params) -> bool:
    """Whether weights are sharded over the mesh axis `fsdp`, as they are when loaded.

    A copy for sampling may be replicated over that axis (`generate.sampling_params`).
    """
    return mesh.is_sharded(params["embed"], "embed", rules=DECODING)
