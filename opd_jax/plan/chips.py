"""What is published of TPU chips and of the slices that they come in.

Sources: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, their tables of specifications and of
supported shapes. Memory that a program can use is less than what is sold: it is what the compiler
(libtpu 0.0.42) names in its refusal of a program that is too large.
"""

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as in `v5e:4x4`; of a local device its kind.
      memory: bytes of device memory that a program can use; None where unknown.
      flops: peak bfloat16 operations a second, of dense products; None where unknown.
      bandwidth: peak bytes a second between the chip and its memory; None where unknown.
      platform: JAX's name of the backend.
    """

    name: str
    memory: int | None
    flops: float | None
    bandwidth: float | None
    platform: str


@dataclass(frozen=True)
class Slice:
    """So many chips, wired together.

    Attributes:
      name: e.g. "v5e:4x4"; "local" for the devices of this machine.
      chip: what they are.
      chips: how many.
      hosts: machines that they are attached to; None where unknown.
    """

    name: str
    chip: Chip
    chips: int
    hosts: int | None


LOCAL = "local"

# 197 TFLOP/s; 16 GB, of which the compiler leaves 15.75 GiB; 819 GB/s.
V5E = Chip("v5e", int(15.75 * GIB), 197e12, 819e9, "tpu")
# 459 TFLOP/s; 95 GB, of which the compiler leaves 95.74 GiB; 2765 GB/s.
V5P = Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, "tpu")
# 918 TFLOP/s; 32 GB, of which the compiler leaves 31.25 GiB; 1638 GB/s.
V6E = Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, "tpu")

# All single slices up to 512 chips; of v5p, whose shapes are many, the common ones.
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SHAPES = {"v5e": _2D, "v5p": _3D, "v6e": _2D}
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E)}

# Up to eight chips of v5e and v6e are one machine; else machines have four each.
_CHIPS_PER_HOST, _MOST_ON_ONE = 4, {"v5e": 8, "v5p": 4, "v6e": 8}

# What the data sheets of the manufacturer say of devices that JAX finds locally, by their kind:
# dense bfloat16 FLOP/s and bytes/s. Their memory is asked of the device.
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
    if family not in CHIPS:
        raise ValueError(
            f"`--topology`: expected one of {', '.join(CHIPS)}, as in v5e:4x4, or {LOCAL}; "
            f"got `{family}`"
        )
    return [_slice(family, shape) for shape in SHAPES[family]]


def _slice(family: str, shape: str) -> Slice:
    chips = math.prod(int(side) for side in shape.split("x"))
    hosts = 1 if chips <= _MOST_ON_ONE[family] else chips // _CHIPS_PER_HOST
    return Slice(f"{family}:{shape}", CHIPS[family], chips, hosts)


def find(topology: str, *, local_chips: int) -> Slice:
    """The slice that a topology such as "v5e:4x4" names.

    Args:
      local_chips: how many devices "local" stands for.

    Raises:
      ValueError: no such family, or no such shape in it; lists what there is.
    """
    if topology == LOCAL:
        return _local(local_chips)
    family, _, shape = topology.partition(":")
    for known in slices(family):
        if known.name == f"{family}:{shape}":
            return known
    raise ValueError(
        f"`--topology`: {family} comes as {', '.join(f'{family}:{s}' for s in SHAPES[family])}; "
        f"got `{topology}`"
    )


def _local(chips: int) -> Slice:
    import jax  # which looks for devices

    device = jax.local_devices()[0]
    flops, bandwidth = _LOCAL_KINDS.get(device.device_kind, (None, None))
    memory = (device.memory_stats() or {}).get("bytes_limit")
    chip = Chip(device.device_kind, memory, flops, bandwidth, device.platform)
    return Slice(LOCAL, chip, chips, None)
