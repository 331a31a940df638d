"""Weights in int8: a frozen model in half the bytes of bfloat16.

Only projections inside the layers, those of experts too, are quantized, symmetrically and by
output channel, to 8 bits; activations are not. Embedding, head, routers, norms and biases, which
are few or looked up by row, stay as they are. There is nothing to calibrate: a scale is the largest
magnitude of its channel / 127.
"""

import jax
import jax.numpy as jnp

from opd_jax.model import ModelConfig, Params, ParamSpec, param_specs
from opd_jax.model.projections import CONTRACTED, Int8Weight


def quantize_weight(weight: jax.Array, *, contracted: tuple[int, ...]) -> Int8Weight:
    """The nearest `values · scale`: each element is at most half a scale away.

    Scale = max |weight| / 127 over the contracted axes, values = round(weight / scale). A channel
    of zeros has the smallest normal float as its scale, not 0, which would divide 0 by 0.

    Args:
      weight: any float dtype and shape.
      contracted: axes of `weight` that the projection sums over.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=contracted, keepdims=True)
    scale = jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny)
    values = jnp.round(weight / scale).astype(jnp.int8)
    return Int8Weight(values, jnp.squeeze(scale, contracted))


def dequantize_weight(weight: Int8Weight, *, contracted: tuple[int, ...]) -> jax.Array:
    """`values · scale` in float32; arguments as in `quantize_weight`."""
    return weight.values * jnp.expand_dims(weight.scale, contracted)


def contracted_axes(key: str, spec: ParamSpec) -> tuple[int, ...]:
    """The axes that the projection `key`, stacked over layers, sums over."""
    return tuple(spec.axes.index(axis) for axis in CONTRACTED[key])


def quantize_params(params: Params, config: ModelConfig) -> Params:
    """The parameters with an `Int8Weight` in the place of each projection of the layers.

    All float weights exist until it returns; `hf.load_params` reads one parameter at a time.
    """
    specs = param_specs(config)["layers"]
    layers = {
        key: quantize_weight(weight, contracted=contracted_axes(key, specs[key]))
        if key in CONTRACTED
        else weight
        for key, weight in params["layers"].items()
    }
    return params | {"layers": layers}


def int8_specs(config: ModelConfig) -> Params:
    """`model.param_specs` of the quantized parameters: two specs where there are two arrays.

    A scale keeps the logical axes of its output channels, so it is split as they are.
    """
    specs = param_specs(config)
    layers = {key: int8_spec(key, spec) for key, spec in specs["layers"].items()}
    return specs | {"layers": layers}


def int8_spec(key: str, spec: ParamSpec) -> ParamSpec | Int8Weight:
    """`spec` of the parameter `key` when it is quantized; itself where it is no projection."""
    if key not in CONTRACTED:
        return spec
    contracted = contracted_axes(key, spec)
    kept = [axis for axis in range(len(spec.shape)) if axis not in contracted]
    shape = tuple(spec.shape[axis] for axis in kept)
    axes = tuple(spec.axes[axis] for axis in kept)
    return Int8Weight(spec, ParamSpec(shape, axes, None))
