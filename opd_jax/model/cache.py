"""The key/value cache of conversations that grow turn by turn."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.model.params import ParamSpec
from opd_jax.model.sizes import ModelConfig
from opd_jax.runtime.mesh import constrain, param_shardings

_CACHE_AXES = {"B": "batch", "G": "kv_heads", "S": "slots", "H": "head_dim"}


@struct.dataclass
class KVCache:
    """Keys and values of B conversations.

    The slot of a token is its position, so rows of different lengths need no padding. Lowering a
    row's length rolls it back: later slots are masked, then overwritten.

    Attributes:
      keys: one buffer for each of L layers, in `layout`: [B, G, S, H] or [B, S, G, H].
      values: the same.
      lengths: int32 [B], the number of tokens in each row.
      layout: "BGSH" or "BSGH"; static.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    layout: str = struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        """Slots in each row, `S`."""
        return self.keys[0].shape[self.layout.index("S")]


def cache_layout(platform: str) -> str:
    """The layout that `attention` reads without copies; `platform` is JAX's name for it."""
    return "BSGH" if platform == "tpu" else "BGSH"


def backend_cache_layout() -> str:
    """`cache_layout` of the current backend."""
    return cache_layout(jax.default_backend())


def cache_specs(config: ModelConfig, *, batch: int, slots: int, layout: str) -> ParamSpec:
    """Shape and logical axes of one layer's keys; its values have the same."""
    sizes = {"B": batch, "G": config.num_kv_heads, "S": slots, "H": config.head_dim}
    shape = tuple(sizes[axis] for axis in layout)
    return ParamSpec(shape, tuple(_CACHE_AXES[axis] for axis in layout), 0.0)


@partial(jax.jit, static_argnames=("config", "batch", "slots", "dtype", "layout"))
def init_cache(
    config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype, layout: str
) -> KVCache:
    """An empty cache of `batch` rows with `slots` slots each, sharded over the current mesh.

    Raises:
      ValueError: the rows or the heads do not divide evenly over the mesh.
    """
    spec = cache_specs(config, batch=batch, slots=slots, layout=layout)
    if not (mesh := jax.sharding.get_abstract_mesh()).empty:
        param_shardings({"cache": spec}, mesh)  # raises

    def buffers() -> tuple[jax.Array, ...]:
        empty = (jnp.zeros(spec.shape, dtype) for _ in range(config.num_layers))
        return tuple(constrain(buffer, *spec.axes) for buffer in empty)

    lengths = constrain(jnp.zeros(batch, jnp.int32), "batch")
    return KVCache(buffers(), buffers(), lengths, layout)


def grow_cache(cache: KVCache, *, slots: int) -> KVCache:
    """Copies the conversations into a cache with more slots; deletes `cache`, as if donated.

    It copies one buffer after another and deletes each at once, so that two whole caches never
    exist at the same time. `slots` is at least the old number.
    """

    def grown(buffer: jax.Array) -> jax.Array:
        wider = _widened(buffer, slots=slots, layout=cache.layout)
        buffer.delete()
        return wider

    keys, values = (tuple(map(grown, part)) for part in (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)


@partial(jax.jit, static_argnames=("slots", "layout"))
def _widened(buffer: jax.Array, *, slots: int, layout: str) -> jax.Array:
    axis = layout.index("S")
    padding = [(0, slots - buffer.shape[axis] if n == axis else 0) for n in range(buffer.ndim)]
    return constrain(jnp.pad(buffer, padding), *(_CACHE_AXES[name] for name in layout))


def append(buffer: jax.Array, new_BTGH: jax.Array, slot_BT: jax.Array, layout: str) -> jax.Array:
    """Writes `new_BTGH` into a buffer at `slot_BT`; slots out of range are dropped."""
    row = jnp.arange(buffer.shape[0])[:, None]
    if layout == "BSGH":
        grown = buffer.at[row, slot_BT].set(new_BTGH, mode="drop")
    else:
        group = jnp.arange(buffer.shape[1])
        grown = buffer.at[row[..., None], group, slot_BT[..., None]].set(new_BTGH, mode="drop")
    # The sharding of the donated buffer, so that it is written in place.
    return constrain(grown, *(_CACHE_AXES[axis] for axis in layout))
