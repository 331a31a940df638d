"""The projections inside the layers: the one place where an activation meets a weight matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from opd_jax.runtime.mesh import constrain

# What a projection gives, to those that choose what the backward pass keeps (`model.REMAT`).
PROJECTION = "projection"

# The logical axes that each projection contracts. They stand behind those of the stack (layers,
# experts) and before those of the output, in the order of `model.param_specs`.
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

# The logical axes of an activation's letters where it meets a weight that stays; of others, none.
_AXES = {"b": "decode_batch", "d": "embed", "n": "heads", "g": "kv_heads", "f": "mlp"}


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


@struct.dataclass
class LoraWeight:
    """A projection's weight as `base + scale · a b`, of which the two factors are trained.

    A node of the parameter tree like `Int8Weight`. Nothing is ever added to `base`: a projection
    multiplies by it and by the factors, and adds the results.

    Attributes:
      base: the frozen weight, an array or an `Int8Weight`.
      a: the stack's axes, then the contracted ones, then the rank.
      b: the stack's axes, then the rank, then those of the output.
      scale: static.
    """

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """A tree of parameters in `dtype`, but for each `Int8Weight`, which has its own."""
    return jax.tree.map(
        lambda p: p if isinstance(p, Int8Weight) else p.astype(dtype),
        params,
        is_leaf=lambda node: isinstance(node, Int8Weight),
    )


def project(x: jax.Array, weight: jax.Array | Int8Weight | LoraWeight, spec: str) -> jax.Array:
    """`einsum(spec, x, weight)` in the dtype of `x`.

    A scale belongs to an output channel, so it leaves the sum: Σ x·v·s = (Σ x·v)·s. Integers up to
    127 are exact in bfloat16, so the product is that of a float weight; the scale multiplies it in
    float32.

    Args:
      spec: of `einsum`; its output ends with the weight's output axes, in their order.
    """
    return checkpoint_name(_product(x, weight, spec, x.dtype), PROJECTION)


def projection(keep_sharded: bool) -> Callable[[jax.Array, Any, str], jax.Array]:
    """`project_sharded` where weights are to stay where they are, else `project`."""
    return project_sharded if keep_sharded else project


def project_sharded(
    x: jax.Array, weight: jax.Array | Int8Weight | LoraWeight, spec: str
) -> jax.Array:
    """`project`, on a mesh with each device multiplying by the part of the weight that it has.

    What is sent are activations, here, and where the caller splits the product over the batch
    again. Otherwise the devices that share a batch gather the weight, which is less to send only
    where they have more tokens than the model is wide. The parts of a sum are float32: rounded,
    they would take what is sampled further from what the update recomputes. The TPU compiler rounds
    them nevertheless where the sum is rounded next, by its own rules of propagation.
    """
    inputs, output = spec.split("->")
    parts = constrain(x, *map(_AXES.get, inputs.partition(",")[0]))
    product = constrain(_product(parts, weight, spec, jnp.float32), *map(_AXES.get, output))
    return product.astype(x.dtype)


def _product(
    x: jax.Array, weight: jax.Array | Int8Weight | LoraWeight, spec: str, dtype: jnp.dtype
) -> jax.Array:
    """`project` in `dtype`, which sums over devices have as well."""
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
    """The two products of `spec` through a rank: "btd,dnh->btnh" by "btd,dr->btr", "btr,rnh->btnh".

    No `spec` of the model has an axis `r`.
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
    """Each row by the matrix of its group, `x[r] @ weight[group[r]]`, [R, F] in `dtype`.

    Args:
      x_RD: rows, those of a group together.
      weight: [G, D, F], one matrix a group.
      group_R: int32, the group of each row, ascending.
      sizes_G: int32, rows of each group; some may have none.
    """
    multiply = partial(jax.lax.ragged_dot, preferred_element_type=dtype)
    if not isinstance(weight, Int8Weight):
        return multiply(x_RD, weight, sizes_G)
    product = multiply(x_RD, weight.values.astype(x_RD.dtype), sizes_G)
    return (product * weight.scale[group_R]).astype(dtype)
