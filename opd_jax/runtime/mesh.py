"""Where arrays live: the device mesh, and the rules that map logical axes to its axes.

The mesh has three axes. `data` replicates parameters and splits the batch; `fsdp` splits both, so
parameters are gathered as they are used, or few tokens come to them; `tensor` splits heads,
feed-forward width and vocabulary. Only this file names mesh axes: arrays carry logical axes, and
`RULES` translates them.

A run sets its mesh once, with `jax.set_mesh`. Inside compiled programs `constrain` then pins the
arrays that the compiler would otherwise be free to gather; without a mesh it does nothing, so the
same functions serve one device.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from opd_jax.runtime.fields import LAYOUT, affects, check_within

MESH_AXES = ("data", "fsdp", "tensor")

# An abstract mesh has sizes and no devices: enough to place what is only planned.
AnyMesh = Mesh | AbstractMesh

# Logical axis -> mesh axis or axes; None is replicated. The axes of one array map to distinct mesh
# axes: so "embed", of parameters, may not share one with what it is contracted against, and
# activations, whose batch takes "fsdp", have their width whole, unless they are a "decode_batch".
Rules = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
    "batch": ("data", "fsdp"),
    # The batch where weights stay and activations come to them, whose width is split as theirs is.
    "decode_batch": "data",
    "layer": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    # Not split: each device has a part of every expert, so a token finds all of its experts where
    # it is, however unevenly they are asked for. Split experts would have to be sent the tokens.
    "expert": None,
    "lora_rank": None,
    "vocab": "tensor",
    "slots": None,
}
# Sampling reads every weight for every token: the student's copy for it may be whole along `fsdp`,
# so that nothing is sent for a token.
SAMPLING_RULES: Rules = {**RULES, "embed": None}


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes.

    Attributes:
      data: replicates parameters, splits the batch.
      fsdp: splits both.
      tensor: splits heads, feed-forward width and vocabulary.
    """

    data: int = field(metadata=affects(LAYOUT))
    fsdp: int = field(metadata=affects(LAYOUT))
    tensor: int = field(metadata=affects(LAYOUT))

    def __post_init__(self):
        check_within(1, **dataclasses.asdict(self))

    @property
    def batch_shards(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp


def make_mesh(
    *, data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A `data` × `fsdp` × `tensor` mesh over the first of `devices`, by default of all.

    A single process may leave devices unused. Of several processes each has to own a part of every
    array, so there the mesh takes all devices.

    Raises:
      ValueError: a size is below one, or their product is more than the number of devices, or, with
        several processes, less.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, processes = (data, fsdp, tensor), jax.process_count()
    size, most = math.prod(sizes), len(devices)
    if min(sizes) < 1 or size > most or (processes > 1 and size < most):
        expected = f"exactly the {most} devices of {processes} processes"
        raise ValueError(
            "`mesh.data` × `mesh.fsdp` × `mesh.tensor` must be positive and multiply to "
            f"{expected if processes > 1 else f'at most {most} devices'}, "
            f"got {data} × {fsdp} × {tensor} = {size}; change the mesh"
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices[:size])


def abstract_mesh(*, data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """The same mesh without devices."""
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=axis_types)


def _mesh_axes(logical: str, rules: Rules = RULES) -> tuple[str, ...]:
    rule = rules[logical]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def _ways(mesh: AnyMesh, logical: str, rules: Rules = RULES) -> int:
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(logical, rules))


def _spec(sizes: Mapping[str, int], axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """What the logical axes of an array's dimensions stand for, as the compiler would write it.

    Without mesh axes of size 1 and without trailing dimensions that are whole. A program that is
    handed its own result then finds the sharding it was compiled for, and is not compiled again.
    """
    dimensions = [
        tuple(axis for axis in _mesh_axes(logical, rules) if sizes[axis] > 1) if logical else ()
        for logical in axes
    ]
    while dimensions and not dimensions[-1]:
        dimensions.pop()
    return PartitionSpec(*(d[0] if len(d) == 1 else d or None for d in dimensions))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(specs: Any, mesh: AnyMesh, *, rules: Rules = RULES) -> Any:
    """The tree of `NamedSharding` for a tree of `model.ParamSpec`: of parameters, or of a cache.

    Args:
      specs: leaves with `.shape` and `.axes`, a logical name for each dimension.
      rules: `RULES`, or `SAMPLING_RULES`.

    Raises:
      ValueError: a dimension is not divisible by the mesh axes that it is split over.
    """

    def sharding(path: tuple, spec: Any) -> NamedSharding:
        for size, logical in zip(spec.shape, spec.axes, strict=True):
            if size % _ways(mesh, logical, rules):
                axes = " × ".join(f"`{axis}`" for axis in _mesh_axes(logical, rules))
                raise ValueError(
                    f"`{_name(path)}` {spec.shape}: dimension `{logical}` = {size} must be "
                    f"divisible by mesh axis {axes} = {_ways(mesh, logical, rules)}; change the "
                    "mesh"
                )
        return NamedSharding(mesh, _spec(mesh.shape, spec.axes, rules))

    # A ParamSpec is a tuple, so without `is_leaf` it would be flattened as a tree.
    return jax.tree_util.tree_map_with_path(sharding, specs, is_leaf=lambda x: hasattr(x, "axes"))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Leading axis split over `data` and `fsdp`, the others replicated."""
    return NamedSharding(mesh, _spec(mesh.shape, ("batch",), RULES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def current() -> Mesh | None:
    """The mesh set by `jax.set_mesh`; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def batch_multiple() -> int:
    """What the rows of a batch have to be a multiple of, on the current mesh."""
    return shards("batch")


def shards(logical: str) -> int:
    """Into how many parts the current mesh splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(mesh, logical)


def check_divides(specs: Any) -> None:
    """Raises as `param_shardings` does where arrays do not divide over the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        param_shardings(specs, mesh)


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """`x` laid out over the current mesh by the logical axes of its dimensions, inside `jit`.

    None, for a dimension, leaves it whole. Without a mesh, or on one device, this is `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(mesh.shape, axes, rules))


def on_each_device(function: Callable, *, in_axes: Any, out_axes: Any, summed: str) -> Callable:
    """`function` of the parts that each device has, its results summed over devices; inside `jit`.

    Where the compiler would not find this partition. Without a mesh this is `function`.

    Args:
      in_axes: a tree over its arguments; for each array a tuple with a logical axis for each
        dimension, None where all of it is wanted on every device.
      out_axes: the same for what it returns.
      summed: logical axis that it contracts, of which each device has a part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda axes: _spec(mesh.shape, axes, RULES), tree, is_leaf=_is_axes)

    return jax.shard_map(
        lambda *parts: total(function(*parts), summed),
        mesh=mesh,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
    )


def total(x: jax.Array, logical: str) -> jax.Array:
    """The sum of what each device has, over a logical axis that is split; in `on_each_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.psum(x, _mesh_axes(logical))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(x is None or isinstance(x, str) for x in node)


def is_sharded(array: Any, logical: str) -> bool:
    """Whether an array, of values or abstract, is split over a mesh axis of a logical axis."""
    spec = getattr(getattr(array, "sharding", None), "spec", ())
    used = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return not used.isdisjoint(_mesh_axes(logical))


def divides(size: int, logical: str) -> bool:
    """Whether a dimension of `size` can be split over the current mesh, inside `jit`."""
    return size % shards(logical) == 0


def replicate(tree: Any) -> Any:
    """Every array of `tree` whole on each device of the current mesh, inside `jit`.

    For results that the host reads: with several processes each of them has them then.
    """
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def shard_batch(tree: Any, mesh: Mesh | None = None) -> Any:
    """Host arrays `[B, ...]` as global arrays sharded over the batch.

    With several processes each has the whole array, and puts its own part on its devices.

    Args:
      tree: numpy arrays.
      mesh: None for the current one; without one either, the arrays stay on the host.

    Raises:
      ValueError: B is not divisible by the devices that the batch is split over.
    """
    mesh = mesh or current()
    if mesh is None:
        return tree
    sharding, ways = batch_sharding(mesh), _ways(mesh, "batch")

    def place(path: tuple, array: Any) -> jax.Array:
        array = np.asarray(array)
        if array.ndim == 0 or array.shape[0] % ways:
            raise ValueError(
                f"batch `{_name(path) or 'array'}` {array.shape}: the number of rows must be "
                f"divisible by `data` × `fsdp` = {mesh.shape['data']} × {mesh.shape['fsdp']} "
                f"= {ways}; change the batch size or the mesh"
            )
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree_util.tree_map_with_path(place, tree)
