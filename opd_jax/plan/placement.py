"""Abstract arrays on a mesh, placed as a run places the real ones."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.model import ModelConfig, is_spec, param_specs
from opd_jax.model.int8 import int8_specs, quantize_params
from opd_jax.runtime import mesh as meshes


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of `ShapeDtypeStruct`s.

    Raises:
      ValueError: an array does not divide over its mesh.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # two 32-bit words
        total += math.prod(shape) * (8 if is_key else leaf.dtype.itemsize)
    return total


@dataclass(frozen=True)
class Placement:
    """A mesh, which may be abstract, and its platform (JAX's name for it).

    The methods return `ShapeDtypeStruct`s where a run has arrays, hence the type `Any`. They raise
    ValueError if a dimension does not divide over the mesh.
    """

    mesh: meshes.AnyMesh
    platform: str

    def params(
        self,
        sizes: ModelConfig,
        dtype: str,
        *,
        rules: meshes.Rules = meshes.TRAINING,
        floats: str = "bfloat16",
    ) -> Any:
        """Parameters of a model.

        Args:
          dtype: "int8" quantizes as `quantize_params` does.
          rules: `mesh.TRAINING` or `mesh.DECODING`, or one of them `mesh.gathered`.
          floats: with "int8", the dtype of what is not quantized.
        """
        if dtype != "int8":
            return self.arrays(param_specs(sizes), dtype, rules=rules)
        shapes = _shapes(param_specs(sizes), floats)
        quantized = jax.eval_shape(partial(quantize_params, config=sizes), shapes)
        return self._place(quantized, int8_specs(sizes), rules)

    def arrays(self, specs: Any, dtype: str, *, rules: meshes.Rules = meshes.TRAINING) -> Any:
        """Arrays for a tree of `model.ParamSpec`."""
        return self._place(_shapes(specs, dtype), specs, rules)

    def _place(self, shapes: Any, specs: Any, rules: meshes.Rules) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            meshes.param_shardings(specs, self.mesh, rules=rules),
        )

    def rows(
        self,
        rows: int,
        *shape: int,
        dtype: Any = jnp.int32,
        rules: meshes.Rules = meshes.TRAINING,
    ) -> Any:
        """An array whose rows are sharded as a batch is."""
        sharding = meshes.batch_sharding(self.mesh, rules=rules)
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=sharding)

    def replicated(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        """An array with a copy on each device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.replicated(self.mesh))


def for_decoding(params: Any, *, platform: str) -> Any:
    """What `generate.for_decoding` makes of abstract parameters."""

    def of_layer(stack: Any) -> Any:
        place = stack.sharding
        rest = jax.NamedSharding(place.mesh, jax.P(*place.spec[1:]))
        return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=rest)

    layers = params["layers"]
    number = jax.tree.leaves(layers)[0].shape[0]
    params = params | {"layers": (jax.tree.map(of_layer, layers),) * number}
    if platform == "cpu" and "head" not in params:
        table = params["embed"]
        place = jax.NamedSharding(table.sharding.mesh, jax.P(*_two(table.sharding.spec)[::-1]))
        params["head"] = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype, sharding=place)
    return params


def _two(spec: Any) -> tuple[Any, ...]:
    """The spec of a matrix with what it leaves out."""
    return (*spec, None, None)[:2]


def _shapes(specs: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype)), specs, is_leaf=is_spec
    )
