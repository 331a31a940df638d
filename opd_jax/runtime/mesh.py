"""The device mesh, and the rules that shard arrays over it.

The mesh has four axes. `data` shards the batch and replicates parameters. `fsdp` shards both:
weights are all-gathered when they are used, or, if tokens are few, activations are sent instead.
`tensor` shards heads, feed-forward width and vocabulary. `decode` is like `fsdp` in training and
like `tensor` in decoding. Decoding reads all of a device's weights for every token, so a device
should have few of them and many rows; in training, activations are larger than weights.

Only this file names mesh axes: arrays have logical axes, and two tables of rules map those to mesh
axes. `TRAINING` is for whole sequences, `DECODING` for what reads and writes a cache.

A run sets its mesh once, with `jax.set_mesh`. Inside compiled programs `constrain` then fixes the
sharding of arrays that the compiler might otherwise all-gather. Without a mesh it does nothing, so
the same functions run on one device.
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

MESH_AXES = ("data", "fsdp", "decode", "tensor")

_AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

# An abstract mesh has sizes and no devices: enough for a plan.
AnyMesh = Mesh | AbstractMesh

# Logical axis -> mesh axis or axes; None is replicated. Two dimensions of one array must not map to
# the same mesh axis. So activations with a "batch", which is sharded over "fsdp", have a replicated
# width; activations with a "decode_batch" have a sharded width.
Rules = Mapping[str, str | tuple[str, ...] | None]
TRAINING: Rules = {
    "batch": ("data", "fsdp", "decode"),
    # The batch of activations that go to sharded weights. Their width is sharded like the weights'.
    "decode_batch": "data",
    "layer": None,
    "embed": ("fsdp", "decode"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    # Replicated: each device has a shard of every expert ("mlp", "embed"), so a token finds all its
    # experts on its device, however uneven the routing. Sharded experts would need an all-to-all.
    "expert": None,
    "lora_rank": None,
    "vocab": "tensor",
    "slots": None,
}
DECODING: Rules = {
    **TRAINING,
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ("decode", "tensor")),
}


def gathered(rules: Rules) -> Rules:
    """The rules of weights that are all-gathered along the axes that shard the batch too."""
    return {**rules, "embed": None}


@dataclass(frozen=True)
class MeshShape:
    """How devices are divided; the module says what each axis of the mesh shards.

    Attributes:
      data: devices along `data`.
      fsdp: devices that shard parameters in training, along `fsdp` and `decode`.
      decode: those of the `fsdp` devices that are along `decode`. If this does not divide `fsdp`,
        their greatest common divisor takes its place, so `fsdp` alone fits any number of devices.
      tensor: devices along `tensor`.
    """

    data: int = field(metadata=affects(LAYOUT))
    fsdp: int = field(metadata=affects(LAYOUT))
    decode: int = field(metadata=affects(LAYOUT))
    tensor: int = field(metadata=affects(LAYOUT))

    def __post_init__(self):
        check_within(1, **dataclasses.asdict(self))

    @property
    def axes(self) -> dict[str, Any]:
        """Sizes of the mesh's axes, the arguments of `make_mesh`."""
        decode = math.gcd(self.fsdp, self.decode)
        return dict(data=self.data, fsdp=self.fsdp // decode, decode=decode, tensor=self.tensor)

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """The number of shards of a batch in training."""
        return self.data * self.fsdp

    @property
    def decode_shards(self) -> int:
        """The number of shards of the rows that decode."""
        return self.data * self.axes["fsdp"]


def make_mesh(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    decode: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A `data` × `fsdp` × `decode` × `tensor` mesh over the first of `devices`, by default of all.

    A single process may leave devices unused. Several processes must use all devices, since each
    has to own a shard of every array.

    Raises:
      ValueError: a size is below one, or the product does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, processes = (data, fsdp, decode, tensor), jax.process_count()
    size, most = math.prod(sizes), len(devices)
    if min(sizes) < 1 or size > most or (processes > 1 and size < most):
        expected = f"exactly the {most} devices of {processes} processes"
        raise ValueError(
            "`mesh.data` × `mesh.fsdp` × `mesh.tensor` must be positive and multiply to "
            f"{expected if processes > 1 else f'at most {most} devices'}, "
            f"got {data} × {fsdp * decode} × {tensor} = {size}; change the mesh"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=_AXIS_TYPES, devices=devices[:size])


def abstract_mesh(*, data: int, fsdp: int, tensor: int, decode: int = 1) -> AbstractMesh:
    """The same mesh without devices."""
    return AbstractMesh((data, fsdp, decode, tensor), MESH_AXES, axis_types=_AXIS_TYPES)


def _mesh_axes(logical: str, rules: Rules) -> tuple[str, ...]:
    rule = rules[logical]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def _shards(mesh: AnyMesh, logical: str, rules: Rules) -> int:
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(logical, rules))


def _spec(sizes: Mapping[str, int], axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes, exactly as the compiler writes it.

    So it has no mesh axes of size 1 and no trailing replicated dimensions. A program that gets its
    own result as input then sees the sharding it was compiled for, and is not compiled again.
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


def param_shardings(specs: Any, mesh: AnyMesh, *, rules: Rules = TRAINING) -> Any:
    """The `NamedSharding` of each `model.ParamSpec` in a tree of parameters or caches.

    Raises:
      ValueError: a dimension is not divisible by the mesh axes that shard it.
    """

    def sharding(path: tuple, spec: Any) -> NamedSharding:
        for size, logical in zip(spec.shape, spec.axes, strict=True):
            if size % _shards(mesh, logical, rules):
                axes = " × ".join(f"`{axis}`" for axis in _mesh_axes(logical, rules))
                raise ValueError(
                    f"`{_name(path)}` {spec.shape}: dimension `{logical}` = {size} must be "
                    f"divisible by mesh axis {axes} = {_shards(mesh, logical, rules)}; change the "
                    "mesh"
                )
        return NamedSharding(mesh, _spec(mesh.shape, spec.axes, rules))

    # A ParamSpec is a tuple, so without `is_leaf` it would be flattened as a tree.
    return jax.tree_util.tree_map_with_path(sharding, specs, is_leaf=lambda x: hasattr(x, "axes"))


def batch_sharding(mesh: AnyMesh, *, rules: Rules = TRAINING) -> NamedSharding:
    """The leading axis is sharded as a batch is; the others are replicated."""
    return NamedSharding(mesh, _spec(mesh.shape, ("batch",), rules))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Every device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def shards(logical: str, *, rules: Rules = TRAINING) -> int:
    """The number of shards of a logical axis on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _shards(mesh, logical, rules)


def is_sharded(array: Any, logical: str, *, rules: Rules = TRAINING) -> bool:
    """Whether an array, concrete or abstract, is sharded over the mesh axes of `logical`."""
    spec = getattr(getattr(array, "sharding", None), "spec", ())
    used = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return not used.isdisjoint(_mesh_axes(logical, rules))


def constrain(x: jax.Array, *axes: str | None, rules: Rules = TRAINING) -> jax.Array:
    """Shards `x` over the current mesh by the logical axes of its dimensions, inside `jit`.

    A dimension with axis None is replicated. Without a mesh, or on one device, this returns `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(mesh.shape, axes, rules))


def replicate(tree: Any) -> Any:
    """Replicates every array of `tree` over the current mesh, inside `jit`.

    For results that the host reads: every process then has all of them.
    """
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def shard_map(
    function: Callable, *, in_axes: Any, out_axes: Any, summed: str | None, rules: Rules
) -> Callable:
    """`jax.shard_map` of `function` by logical axes, inside `jit`.

    For a partition that the compiler would not find. Without a mesh this is `function`.

    Args:
      in_axes: a tree over the arguments: for each array a tuple of logical axes, one a dimension;
        None is replicated.
      out_axes: the same for the results.
      summed: the sharded logical axis that `function` contracts; results are psummed over it.
        None: each device has its own part of the arguments, and of the results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda axes: _spec(mesh.shape, axes, rules), tree, is_leaf=_is_axes)

    return jax.shard_map(
        function if summed is None else lambda *x: psum(function(*x), summed, rules=rules),
        mesh=mesh,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        # A kernel does not say over which axes its results vary.
        check_vma=summed is not None,
    )


def psum(x: jax.Array, logical: str, *, rules: Rules) -> jax.Array:
    """`jax.lax.psum` over a sharded logical axis, inside `shard_map`; `x` without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # Those that a spec names: along an axis of size 1 nothing varies.
    axes = tuple(axis for axis in _mesh_axes(logical, rules) if mesh.shape[axis] > 1)
    return jax.lax.psum(x, axes) if axes else x


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(x is None or isinstance(x, str) for x in node)


def shard_batch(tree: Any, mesh: Mesh | None = None, *, rules: Rules = TRAINING) -> Any:
    """Host arrays `[B, ...]` as global arrays sharded over the batch.

    Every process passes all rows and copies only the shards of its own devices. `mesh` is by
    default the current one; without any, the arrays stay on the host.

    Raises:
      ValueError: B is not divisible by the number of shards of the batch.
    """
    mesh = mesh or jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    sharding, shards = batch_sharding(mesh, rules=rules), _shards(mesh, "batch", rules)
    axes = _mesh_axes("batch", rules)

    def place(path: tuple, array: Any) -> jax.Array:
        array = np.asarray(array)
        if array.ndim == 0 or array.shape[0] % shards:
            raise ValueError(
                f"batch `{_name(path) or 'array'}` {array.shape}: the number of rows must be "
                f"divisible by {' × '.join(f'`{axis}`' for axis in axes)} = "
                f"{' × '.join(str(mesh.shape[axis]) for axis in axes)} = {shards}; change the "
                "batch size or the mesh"
            )
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree_util.tree_map_with_path(place, tree)
