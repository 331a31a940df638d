"""Int8 weights: a frozen model in half the bytes of bfloat16.

The projections inside the layers, including those of experts, are quantized to 8 bits: symmetric,
one scale for each output channel. Activations are not quantized. Embedding, head, routers, norms
and biases keep their dtype. There is no calibration: a scale is the largest magnitude of its
channel / 127.
"""

import jax
import jax.numpy as jnp

from opd_jax.model import ModelConfig, Params, ParamSpec, param_specs
from opd_jax.model.projections import CONTRACTED, Int8Weight


def quantize_weight(weight: jax.Array, *, contracted: tuple[int, ...]) -> Int8Weight:
    """The nearest `values · scale`; no element moves by more than half a scale.

    scale = max |weight| / 127 over the `contracted` axes, values = round(weight / scale). A channel
    of zeros gets the smallest normal float as its scale, since 0 / 0 is NaN.
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
    """The axes that the projection `key` sums over, in the weight stacked over layers."""
    return tuple(spec.axes.index(axis) for axis in CONTRACTED[key])


def quantize_params(params: Params, config: ModelConfig) -> Params:
    """Replaces the weight of each projection in the layers by an `Int8Weight`.

    All float weights stay in memory until it returns. `hf.load_params` avoids that: it reads and
    quantizes one parameter at a time.
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
    """`model.param_specs` of the quantized parameters: an `Int8Weight` of two specs each.

    A scale has the logical axes of its output channels and is sharded like them.
    """
    specs = param_specs(config)
    layers = {key: int8_spec(key, spec) for key, spec in specs["layers"].items()}
    return specs | {"layers": layers}


def int8_spec(key: str, spec: ParamSpec) -> ParamSpec | Int8Weight:
    """The spec of the parameter `key` after quantization; unchanged if it is no projection."""
    if key not in CONTRACTED:
        return spec
    contracted = contracted_axes(key, spec)
    kept = [axis for axis in range(len(spec.shape)) if axis not in contracted]
    shape = tuple(spec.shape[axis] for axis in kept)
    axes = tuple(spec.axes[axis] for axis in kept)
    return Int8Weight(spec, ParamSpec(shape, axes, None))
