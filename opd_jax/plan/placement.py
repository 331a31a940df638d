"""Abstract arrays placed on a mesh as a run places the real ones."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import model
from opd_jax.model import KVCache, ModelConfig, is_spec, param_specs
from opd_jax.model.int8 import int8_specs, quantize_params
from opd_jax.plan.traffic import device_bytes
from opd_jax.runtime.mesh import (
    RULES,
    SAMPLING_RULES,
    AnyMesh,
    batch_sharding,
    param_shardings,
    replicated,
)


@dataclass(frozen=True)
class Placement:
    """A mesh, which may be abstract, and how caches are laid out for its platform.

    What it gives are `ShapeDtypeStruct`s in the place of arrays, hence the types.
    """

    mesh: AnyMesh
    layout: str

    def params(
        self, sizes: ModelConfig, dtype: str, *, gathered: bool = False, floats: str = "bfloat16"
    ) -> Any:
        """Parameters as they are loaded, or with `gathered` whole along `fsdp`.

        Args:
          dtype: "int8" is `quantize` over `floats`.
          floats: with int8, of what is not quantized.

        Raises:
          ValueError: a dimension does not divide over the mesh.
        """
        if dtype != "int8":
            return self.arrays(param_specs(sizes), dtype, gathered=gathered)
        shapes = _shapes(param_specs(sizes), floats)
        quantized = jax.eval_shape(partial(quantize_params, config=sizes), shapes)
        return self._placed(quantized, int8_specs(sizes), gathered)

    def arrays(self, specs: Any, dtype: str, *, gathered: bool = False) -> Any:
        """`params` of any tree of `model.ParamSpec`."""
        return self._placed(_shapes(specs, dtype), specs, gathered)

    def _placed(self, shapes: Any, specs: Any, gathered: bool) -> Any:
        rules = SAMPLING_RULES if gathered else RULES
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            param_shardings(specs, self.mesh, rules=rules),
        )

    def cache(self, sizes: ModelConfig, params: Any, *, rows: int, slots: int) -> Any:
        """`model.init_cache` without its arrays, for parameters of a dtype.

        Raises:
          ValueError: rows or heads do not divide over the mesh.
        """
        spec = model.cache_specs(sizes, batch=rows, slots=slots, layout=self.layout)
        where = param_shardings({"cache": spec}, self.mesh)["cache"]
        buffer: Any = jax.ShapeDtypeStruct(spec.shape, params["embed"].dtype, sharding=where)
        buffers = (buffer,) * sizes.num_layers
        return KVCache(buffers, buffers, self.rows(rows), self.layout)

    def rows(self, rows: int, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array whose rows are split over the batch's axes of the mesh.

        Raises:
          ValueError: they do not divide.
        """
        sharding = batch_sharding(self.mesh)
        array = jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=sharding)
        try:
            sharding.shard_shape(array.shape)
        except ValueError:
            sizes = self.mesh.shape
            raise ValueError(
                f"{rows} rows do not divide over `mesh.data` × `mesh.fsdp` = {sizes['data']} × "
                f"{sizes['fsdp']}; change the batch or the mesh"
            ) from None
        return array

    def whole(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        """An array with a copy on each device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def head_bytes(self, sizes: ModelConfig, dtype: str) -> int:
        """Bytes on one device of an output head that is whole along `fsdp`."""
        # Tied or not, the embedding has its shape and, turned, its axes.
        return device_bytes(self.params(sizes, dtype, gathered=True)["embed"])


def _shapes(specs: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype)), specs, is_leaf=is_spec
    )
