"""The projections inside the layers: products of an activation and a weight matrix.

On a mesh a weight is sharded. Either it is all-gathered and then multiplied (`project`), or
activations go to its shards (`project_sharded`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from opd_jax.runtime.mesh import DECODING, constrain

# The name of every projection's output, by which `model.REMAT` chooses what to keep.
PROJECTION = "projection"

# The logical axes that each projection contracts. A weight's axes: stack (layers, experts),
# contracted, output.
CONTRACTED: dict[str, tuple[str, ...]] = {
    "q": ("embed",),
    "k": ("embed",),
    "v": ("embed",),
    "o": ("heads", "head_dim"),
    "gate": ("embed",),
    "up": ("embed",),
    "down": ("mlp",),
    "expert_gate": ("embed",),
    "expert_up": ("embed",),
    "expert_down": ("mlp",),
}

# Letter in an einsum -> logical axis of an activation that goes to sharded weights. Axes of other
# letters are replicated.
_AXES = {"b": "decode_batch", "d": "embed", "n": "heads", "g": "kv_heads", "f": "mlp"}


@struct.dataclass
class Int8Weight:
    """A projection's weight as `values · scale`, with one scale for each output channel.

    It takes the place of an array in the parameter tree. Both parts begin with the axes of the
    stack, so scanning over layers or indexing a layer works on both. In a tree of specs or
    shardings its two parts are specs or shardings.

    Attributes:
      values: int8 in the shape of the weight, -127..127.
      scale: float32 in that shape without the contracted axes (`CONTRACTED`).
    """

    values: Any
    scale: Any


@struct.dataclass
class LoraWeight:
    """A projection's weight as `base + scale · a b`; only the factors a and b are trained.

    It takes the place of an array in the parameter tree, like `Int8Weight`. The sum is never
    formed: a projection multiplies by `base` and by the factors, and adds the two results.

    Attributes:
      base: the frozen weight, an array or an `Int8Weight`.
      a: axes of the stack, contracted axes, rank.
      b: axes of the stack, rank, axes of the output.
      scale: α / r; static.
    """

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """Casts a tree of parameters to `dtype`, except each `Int8Weight`."""
    return jax.tree.map(
        lambda p: p if isinstance(p, Int8Weight) else p.astype(dtype),
        params,
        is_leaf=lambda node: isinstance(node, Int8Weight),
    )


def project(x: jax.Array, weight: jax.Array | Int8Weight | LoraWeight, spec: str) -> jax.Array:
    """`einsum(spec, x, weight)` in the dtype of `x`; a sharded weight is all-gathered over `fsdp`.

    An int8 scale belongs to an output channel, so it factors out of the sum: Σ x·v·s = (Σ x·v)·s.
    Integers up to 127 are exact in bfloat16, so `x·v` is as exact as with a float weight. The scale
    multiplies in float32.

    `weight` is that of one layer. The output of `spec` ends with the output axes of the weight, in
    order.
    """
    return checkpoint_name(_product(x, weight, spec, x.dtype), PROJECTION)


def projection(all_gather: bool) -> Callable[[jax.Array, Any, str], jax.Array]:
    """`project` if weights are all-gathered, else `project_sharded`."""
    return project if all_gather else project_sharded


def project_sharded(
    x: jax.Array, weight: jax.Array | Int8Weight | LoraWeight, spec: str
) -> jax.Array:
    """`project` without an all-gather: each device multiplies by its own shard of the weight.

    Activations go to the shards instead; the caller sends the result back. That moves fewer bytes
    than the weight if a device has fewer tokens than the model's width.

    Partial sums are psummed in float32. Rounding them first would move the sampled
    log-probabilities away from those that the update recomputes. The TPU compiler still rounds
    before the psum if the result is cast right after it.
    """
    inputs, output = spec.split("->")
    parts = constrain(x, *map(_AXES.get, inputs.partition(",")[0]), rules=DECODING)
    product = _product(parts, weight, spec, jnp.float32)
    return constrain(product, *map(_AXES.get, output), rules=DECODING).astype(x.dtype)


def _product(
    x: jax.Array, weight: jax.Array | Int8Weight | LoraWeight, spec: str, dtype: jnp.dtype
) -> jax.Array:
    """`project` in `dtype`, in which sums over devices are taken too."""
    multiply = partial(jnp.einsum, preferred_element_type=dtype)
    if isinstance(weight, LoraWeight):
        into, out_of = _through_rank(spec)
        low = multiply(into, x, weight.a).astype(x.dtype) * weight.scale
        return _product(x, weight.base, spec, dtype) + multiply(out_of, low, weight.b)
    if not isinstance(weight, Int8Weight):
        return multiply(spec, x, weight)
    product = multiply(spec, x, weight.values.astype(x.dtype))
    return (product * weight.scale).astype(dtype)


def _through_rank(spec: str) -> tuple[str, str]:
    """The specs of x A and (x A) B: "btd,dr->btr" and "btr,rnh->btnh" for "btd,dnh->btnh".

    No spec of the model uses the letter `r`.
    """
    inputs, output = spec.split("->")
    x, weight = inputs.split(",")
    contracted = "".join(axis for axis in weight if axis not in output)
    kept = "".join(axis for axis in weight if axis in output)
    low = "".join(axis for axis in x if axis not in contracted) + "r"
    return f"{x},{contracted}r->{low}", f"{low},r{kept}->{output}"


def project_groups(
    x_RD: jax.Array,
    weight: jax.Array | Int8Weight,
    group_R: jax.Array,
    sizes_G: jax.Array,
    *,
    dtype: jnp.dtype,
) -> jax.Array:
    """Multiplies each row by the matrix of its group: `x[r] @ weight[group[r]]`, [R, F].

    Args:
      x_RD: rows sorted by group.
      weight: [G, D, F], one matrix for each group.
      group_R: int32, the group of each row, ascending.
      sizes_G: int32, the number of rows in each group; may be 0.
      dtype: the dtype of sums and of the result.
    """
    multiply = partial(jax.lax.ragged_dot, preferred_element_type=dtype)
    if not isinstance(weight, Int8Weight):
        return multiply(x_RD, weight, sizes_G)
    product = multiply(x_RD, weight.values.astype(x_RD.dtype), sizes_G)
    return (product * weight.scale[group_R]).astype(dtype)
