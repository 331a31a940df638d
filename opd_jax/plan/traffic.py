"""Bytes of abstract arrays on one device, and how often a program moves them."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of `ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: an array does not divide over its mesh.
    """
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return math.prod(shape) * 8  # two 32-bit words
    return math.prod(shape) * leaf.dtype.itemsize


# The largest memory beside the cores of any chip in `chips` (the vector memory of v5e and v6e).
# What fits in there may be read once and kept.
ON_CHIP = 128 * 2**20


@dataclass(frozen=True)
class Moved:
    """What a program must read from, or write to, its device's memory.

    Counted is what no compiler can avoid: operands too large to be kept on the chip, each time that
    the program goes through them. Activations that could stay there are left out, and so is what
    arrives from other devices.

    Attributes:
      what: in words.
      bytes: on one device, once.
      times: in one run of the program.
    """

    what: str
    bytes: int
    times: int

    @property
    def total(self) -> int:
        """Bytes in one run."""
        return self.bytes * (self.times if self.bytes > ON_CHIP else min(self.times, 1))
