"""Names and shapes of the tensors that store each parameter. Only this file knows them.

A projection is stored as one tensor for each layer, `[out, in]`, with heads and head size merged.
Ours is `[L, in, ...]` with separate axes for the two (`model.param_specs`). An embedding has the
same shape in both. Each expert of a mixture has its own tensors.
"""

from typing import Any

import jax
import numpy as np

from opd_jax.model import ModelConfig, ParamSpec, is_spec, param_specs

LAYERS = "model.layers."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Our parameter -> name of its tensors. No family has all of them; the names are always the same.
_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "router": "model.layers.{}.mlp.gate.weight",
    "expert_gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "expert_up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "expert_down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
EMBED, HEAD = _NAMES["embed"], _NAMES["head"]


def leaves(config: ModelConfig) -> list[tuple[str, ParamSpec]]:
    """Name and spec of each parameter, in the order of `jax.tree.leaves`."""
    paths = jax.tree.leaves_with_path(param_specs(config), is_leaf=is_spec)
    return [(path[-1].key, spec) for path, spec in paths]


def tensor_names(key: str, spec: ParamSpec) -> list[str]:
    """Names of a parameter's tensors: one for each place in its stack, in row-major order."""
    return [_NAMES[key].format(*place) for place in np.ndindex(stack_shape(spec))]


def stack_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Sizes of the axes that stack tensors: (), (layers,) or (layers, experts)."""
    within = (axis for axis, name in enumerate(spec.axes) if name not in ("layer", "expert"))
    return spec.shape[: next(within)]


def stored_shape(key: str, spec: ParamSpec) -> tuple[int, ...]:
    """Shape of each tensor of a parameter."""
    merged = _merge_heads(spec.shape[len(stack_shape(spec)) :], _head_dim_axis(spec))
    return merged if key == "embed" else merged[::-1]


def to_stored(key: str, spec: ParamSpec, layer: np.ndarray) -> np.ndarray:
    """One layer (or expert) of a parameter as it is stored."""
    merged = layer.reshape(_merge_heads(layer.shape, _head_dim_axis(spec)))
    return np.ascontiguousarray(merged if key == "embed" else merged.T)


def read_slice(tensor: Any, key: str, spec: ParamSpec, index: tuple[slice, ...]) -> np.ndarray:
    """Reads the slice `index` of one tensor of a parameter into our layout, and little else.

    Args:
      tensor: a lazy slice of safetensors.
      index: a slice for each dimension of our layout, without the stack.
    """
    shape, axis = spec.shape[len(stack_shape(spec)) :], _head_dim_axis(spec)
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    sizes = [stop - start for start, stop in bounds]
    if axis is not None:  # Read whole heads, then slice them: the head size is rarely sharded.
        start, stop = bounds[axis - 1]
        bounds[axis - 1 : axis + 1] = [(start * shape[axis], stop * shape[axis])]
        sizes[axis] = shape[axis]
    stored = bounds if key == "embed" else bounds[::-1]
    block = tensor[tuple(slice(*bound) for bound in stored)]
    part = (block if key == "embed" else block.T).reshape(sizes)
    return part if axis is None else part[(slice(None),) * axis + (index[axis],)]


def _head_dim_axis(spec: ParamSpec) -> int | None:
    """Axis of the head size within one tensor, if it is stored merged with the heads before it."""
    axes = spec.axes[len(stack_shape(spec)) :]
    return axes.index("head_dim") if "head_dim" in axes[1:] else None


def _merge_heads(sizes: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return sizes
    return (*sizes[: axis - 1], sizes[axis - 1] * sizes[axis], *sizes[axis + 1 :])
