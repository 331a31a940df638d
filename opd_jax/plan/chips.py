"""TPU chips and the slices that they come in.

Sources: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, their tables of specifications and of
supported shapes. Usable memory is less than what is sold: it is what the compiler (libtpu 0.0.42)
names when it refuses a program that is too large.
"""

import math
from dataclasses import dataclass

import jax

GIB = 2**30


# How long a collective of few bytes is assumed to take. Measured figures are not published.
LATENCY_S = 5e-6


@dataclass(frozen=True)
class Chip:
    """One accelerator; None is unknown."""

    name: str  # as in "v5e:4x4"; of a local device its kind
    memory: int | None  # usable bytes of device memory
    flops: float | None  # peak FLOP/s of dense bfloat16 products
    bandwidth: float | None  # peak bytes/s between the chip and its memory
    platform: str  # JAX's name of the backend


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together."""

    name: str  # e.g. "v5e:4x4"; "local" for the devices of this machine
    chip: Chip
    chips: int  # how many


LOCAL = "local"

# 197 TFLOP/s; 16 GB, of which 15.75 GiB are usable; 819 GB/s.
V5E = Chip("v5e", int(15.75 * GIB), 197e12, 819e9, "tpu")
# 459 TFLOP/s; 95 GB, of which 95.74 GiB are usable; 2765 GB/s.
V5P = Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, "tpu")
# 918 TFLOP/s; 32 GB, of which 31.25 GiB are usable; 1638 GB/s.
V6E = Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, "tpu")

# All single slices up to 512 chips; of v5p, which has many shapes, the common ones.
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_FAMILIES = {"v5e": (V5E, _2D), "v5p": (V5P, _3D), "v6e": (V6E, _2D)}

# Dense bfloat16 FLOP/s and bytes/s of local devices by their kind, from NVIDIA's data sheets.
_LOCAL_KINDS = {
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
}


def slices(family: str) -> list[Slice]:
    """Every slice of a family, the smallest first.

    Raises:
      ValueError: an unknown family.
    """
    if family not in _FAMILIES:
        raise ValueError(
            f"`--topology`: expected one of {', '.join(_FAMILIES)}, as in v5e:4x4, or {LOCAL}; "
            f"got `{family}`"
        )
    chip, shapes = _FAMILIES[family]
    return [
        Slice(f"{family}:{shape}", chip, math.prod(map(int, shape.split("x")))) for shape in shapes
    ]


def find(topology: str, *, local_chips: int) -> Slice:
    """The slice that a topology such as "v5e:4x4" names.

    Args:
      local_chips: the number of devices for "local".

    Raises:
      ValueError: no such family, or no such shape in it; lists what there is.
    """
    if topology == LOCAL:
        device = jax.local_devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit")
        kind, platform = device.device_kind, device.platform
        flops, bandwidth = _LOCAL_KINDS.get(kind, (None, None))
        return Slice(LOCAL, Chip(kind, memory, flops, bandwidth, platform), local_chips)
    family = topology.partition(":")[0]
    known = {where.name: where for where in slices(family)}
    if topology not in known:
        raise ValueError(f"`--topology`: expected one of {', '.join(known)}; got `{topology}`")
    return known[topology]
