"""What a program sends between devices, by counting.

Weights and gradients can be on the way while others are used. A sum over the shards of heads
cannot: the next layer waits for it.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax

from opd_jax.model import ModelConfig, is_sharded
from opd_jax.plan.placement import Placement, device_bytes


class Sent(NamedTuple):
    """What one device sends in one run of a program.

    Attributes:
      ahead: bytes of weights and gradients.
      awaited: bytes of sums over shards, each of which all that follows waits for.
      waits: the number of these sums.
    """

    ahead: float = 0
    awaited: float = 0
    waits: float = 0


def decoding(
    place: Placement, sizes: ModelConfig, params: Any, *, rows: int, width: int, times: int
) -> Sent:
    """Of `times` passes of `width` tokens in each of `rows` rows over weights and a cache."""
    mesh, layers = place.mesh.shape, sizes.num_layers
    heads, ways = mesh["decode"] * mesh["tensor"], mesh["fsdp"]
    tokens = rows * width / (mesh["data"] * ways)  # of a device
    size = params["embed"].dtype.itemsize
    # After attention, after the feed-forward layer, and of the embedding; the logits' is small.
    sums = [(2 * layers + 1, heads, tokens * sizes.d_model * size), (1, heads, 0)]
    ahead = 0.0
    if is_sharded(params) and rows * width <= sizes.d_model * mesh["data"]:
        # Tokens go to the weights, those of all the `fsdp` devices: sums of the projections into
        # a layer in float32, and its outputs back.
        into = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim + 2 * _width(sizes)
        part = tokens * ways * (into / 2 / heads) * 4
        sums += [(2 * layers, ways, part), (2 * layers, ways, tokens * sizes.d_model * size)]
    elif is_sharded(params):
        ahead = _gathered(params, ways)
    return _sent(times * ahead, [(times * number, *one) for number, *one in sums])


def training(
    place: Placement,
    sizes: ModelConfig,
    params: Any,
    trained: Any,
    *,
    tokens: int,
    parts: int,
    passes: int,
    dtype: Any,
) -> Sent:
    """Of `passes` over the weights with sequences of `tokens` in all, in `parts` micro-batches.

    Args:
      params: whose weights are gathered for each pass over a micro-batch.
      trained: whose gradients are summed for each micro-batch; None for none.
      dtype: weights, activations and gradients are sent in it.
    """
    mesh, size = place.mesh.shape, dtype.itemsize
    ways = mesh["fsdp"] * mesh["decode"]

    # An all-gather, and a reduce-scatter of as many bytes.
    sharded = passes * _gathered(params, ways, size) + _gathered(trained, ways, size)
    copies = _ring(mesh["data"], sum(map(partial(_bytes, size=size), jax.tree.leaves(trained))))
    local = tokens * sizes.d_model * size / (mesh["data"] * ways)
    sums = 2 * sizes.num_layers * passes
    # A micro-batch has its part of the tokens.
    return _sent(parts * sharded + copies, [(sums * parts, mesh["tensor"], local / parts)])


def _sent(ahead: float, sums: list[tuple[float, int, float]]) -> Sent:
    """From sums as (how many, over so many devices, bytes of each)."""
    real = [(number, ways, size) for number, ways, size in sums if ways > 1]
    awaited = sum(number * _ring(ways, size) for number, ways, size in real)
    return Sent(ahead, awaited, sum(number for number, _, _ in real))


def _gathered(tree: Any, ways: int, size: float = math.inf) -> float:
    """Bytes that a device sends when sharded arrays are all-gathered, `_bytes` of each."""
    sharded = (x for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated)
    return sum(_bytes(x, size) for x in sharded) * (ways - 1)


def _bytes(array: Any, size: float) -> float:
    """Bytes of a device's shard; elements are sent with at most `size` of them."""
    return device_bytes(array) * min(1, size / array.dtype.itemsize)


def _ring(ways: int, size: float) -> float:
    """Bytes that a device sends in an all-reduce of `size` bytes."""
    return 2 * size * (ways - 1) / ways


def _width(sizes: ModelConfig) -> int:
    """The feed-forward width that a token passes, of a mixture that of its experts."""
    return sizes.d_ff if sizes.experts is None else sizes.experts.per_token * sizes.experts.d_ff
