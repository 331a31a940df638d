"""The projections inside the layers: the one place where an activation meets a weight matrix."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# The logical axes that each projection contracts. They stand behind those of the stack (layers)
# and before those of the output, in the order of `model.param_specs`.
CONTRACTED: dict[str, tuple[str, ...]] = {
    "q": ("embed",),
    "k": ("embed",),
    "v": ("embed",),
    "o": ("heads", "head_dim"),
    "gate": ("embed",),
    "up": ("embed",),
    "down": ("mlp",),
}


@struct.dataclass
class Int8Weight:
    """A projection's weight as `values · scale`, with one scale for each output channel.

    A node of the parameter tree in the place of an array: leading axes of both parts are those of
    the stack, so a scan over layers and an index into them take each layer's part of both. In a
    tree of specs or shardings it holds two of those.

    Attributes:
      values: int8, in the shape of the weight, within ±127.
      scale: float32, in that shape without the contracted axes (`CONTRACTED`).
    """

    values: Any
    scale: Any


def project(x: jax.Array, weight: jax.Array | Int8Weight, spec: str) -> jax.Array:
    """`einsum(spec, x, weight)` in the dtype of `x`.

    A scale belongs to an output channel, so it leaves the sum: Σ x·v·s = (Σ x·v)·s. Integers up to
    127 are exact in bfloat16, so the product is that of a float weight; the scale multiplies it in
    float32.

    Args:
      spec: of `einsum`; its output ends with the weight's output axes, in their order.
    """
    if not isinstance(weight, Int8Weight):
        return jnp.einsum(spec, x, weight)
    product = jnp.einsum(spec, x, weight.values.astype(x.dtype))
    return (product * weight.scale).astype(x.dtype)
