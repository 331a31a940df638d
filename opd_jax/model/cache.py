"""The key/value cache of conversations that grow turn by turn."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.model.params import ParamSpec
from opd_jax.model.sizes import ModelConfig
from opd_jax.runtime import mesh
from opd_jax.runtime.mesh import DECODING, constrain, param_shardings

# [B, G, S, H]: the slots of a head follow each other, as kernels read them. The TPU compiler copies
# no cache for it either.
_AXES = ("batch", "kv_heads", "slots", "head_dim")


@struct.dataclass
class Int8Slots:
    """Keys or values as `values · scale`: half the bytes of bfloat16.

    Attributes:
      values: int8 [B, G, S, H], -127..127.
      scale: float32 [B, G, S]: max |x| / 127 of each head of a token.
    """

    values: Any
    scale: Any


Buffer = jax.Array | Int8Slots


@struct.dataclass
class KVCache:
    """Keys and values of B conversations.

    The slot of a token is its position, so rows of different lengths need no padding. Lowering a
    row's length rolls it back: later slots are masked, then overwritten.

    Attributes:
      keys: one buffer for each of L layers: an array [B, G, S, H], or an `Int8Slots`.
      values: the same.
      lengths: int32 [B], the number of tokens in each row.
    """

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]
    lengths: jax.Array

    @property
    def slots(self) -> int:
        """Slots in each row, `S`."""
        return jax.tree.leaves(self.keys)[0].shape[2]


def cache_specs(
    config: ModelConfig, *, batch: int, slots: int, int8: bool = False
) -> ParamSpec | Int8Slots:
    """Shape and logical axes of one layer's keys; its values have the same."""
    shape = batch, config.num_kv_heads, slots, config.head_dim
    spec = ParamSpec(shape, _AXES, 0.0)
    return Int8Slots(spec, ParamSpec(shape[:-1], _AXES[:-1], 0.0)) if int8 else spec


@partial(jax.jit, static_argnames=("config", "batch", "slots", "dtype", "int8"))
def init_cache(
    config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype, int8: bool = False
) -> KVCache:
    """An empty cache of `batch` rows with `slots` slots each, sharded over the current mesh.

    With `int8` its buffers are `Int8Slots`; `dtype` is that of others.

    Raises:
      ValueError: the rows or the heads do not divide evenly over the mesh.
    """
    specs = cache_specs(config, batch=batch, slots=slots, int8=int8)
    if not (current := jax.sharding.get_abstract_mesh()).empty:
        param_shardings({"cache": specs}, current, rules=DECODING)  # raises

    def empty(spec: ParamSpec, dtype: jnp.dtype) -> jax.Array:
        return constrain(jnp.zeros(spec.shape, dtype), *spec.axes, rules=DECODING)

    def buffer() -> Buffer:
        if isinstance(specs, Int8Slots):
            return Int8Slots(empty(specs.values, jnp.int8), empty(specs.scale, jnp.float32))
        return empty(specs, dtype)

    def buffers() -> tuple[Buffer, ...]:
        return tuple(buffer() for _ in range(config.num_layers))

    lengths = constrain(jnp.zeros(batch, jnp.int32), "batch", rules=DECODING)
    return KVCache(buffers(), buffers(), lengths)


def append(
    buffer: Buffer,
    new_BTGH: jax.Array,
    slot_BT: jax.Array,
    *,
    rows: jax.Array | None = None,
) -> Buffer:
    """Writes `new_BTGH` into a buffer at `slot_BT`; slots out of range are dropped.

    `rows` are the rows of the buffer that are written, as in `take_rows`.
    """
    if isinstance(buffer, Int8Slots):
        values, scale = _quantized(new_BTGH)
        return Int8Slots(
            append(buffer.values, values, slot_BT, rows=rows),
            append(buffer.scale, scale, slot_BT, rows=rows),
        )
    rows = jnp.arange(buffer.shape[0]) if rows is None else rows
    grown = _by_shard(_write, buffer, new_BTGH, slot_BT, rows)
    # The sharding of the donated buffer, so that it is written in place.
    return constrain(grown, *_AXES[: grown.ndim], rules=DECODING)


def _quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest values · scale, int8 [..., H] and float32 [...], with scale = max |x| / 127."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _write(buffer, new_BTGH, slot_BT, rows):
    group = jnp.arange(buffer.shape[1])
    return buffer.at[rows[:, None, None], group, slot_BT[..., None]].set(new_BTGH, mode="drop")


def take_rows(array: jax.Array, rows: jax.Array | None) -> jax.Array:
    """`array[rows]`, or `array` if `rows` is None.

    Args:
      array: [C, ...], sharded over the batch.
      rows: int32 [B], sharded over the batch. Each device's part names rows of its own shard.
    """
    if rows is None:
        return array
    return _by_shard(lambda x, rows: x[rows], array, rows)


def put_rows(array: jax.Array, new: jax.Array, place: jax.Array, rows: jax.Array) -> jax.Array:
    """`array[rows[b], place[b, t]] = new[b, t]`; places out of range are dropped.

    Args:
      array: [C, R, ...], sharded over the batch.
      new: [B, T, ...].
      place: int32 [B, T].
      rows: as in `take_rows`.
    """

    def put(array, new, place, rows):
        return array.at[rows[:, None], place].set(new, mode="drop")

    return _by_shard(put, array, new, place, rows)


def add_rows(lengths: jax.Array, counts: jax.Array, rows: jax.Array | None) -> jax.Array:
    """`lengths` [C] with `counts` [B] added at `rows`, as in `take_rows`."""
    if rows is None:
        return lengths + counts
    return _by_shard(lambda x, count, rows: x.at[rows].add(count), lengths, counts, rows)


def _by_shard(
    function: Callable[..., jax.Array], array: jax.Array, *arguments: jax.Array
) -> jax.Array:
    """`function(array, ..., rows)` of each shard, with rows numbered within it.

    With numbers of all rows the compiler would all-gather what is read or written.
    """
    shards = mesh.shards("batch", rules=DECODING)
    if shards == 1:
        return function(array, *arguments)
    *others, rows = arguments
    rows %= array.shape[0] // shards
    parts = [x.reshape(shards, -1, *x.shape[1:]) for x in (array, *others, rows)]
    result = jax.vmap(function)(*parts)
    return result.reshape(-1, *result.shape[2:])
