"""TPU chips and the slices that they come in, and GPUs by their number.

Sources: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, their tables of specifications and of
supported shapes; NVIDIA's data sheets. Usable memory of a TPU is less than what is sold: it is what
the compiler (libtpu 0.0.42) names when it refuses a program that is too large. Wires are counted in
the direction away from the chip.
"""

import math
from dataclasses import dataclass, replace

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
    wires: float | None  # peak bytes/s that it sends to other chips
    platform: str  # JAX's name of the backend


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together."""

    name: str  # e.g. "v5e:4x4"; "local" for the devices of this machine
    chip: Chip
    chips: int  # how many


LOCAL = "local"

# 197 TFLOP/s; 16 GB, of which 15.75 GiB are usable; 819 GB/s; wires of 1,600 Gbit/s.
V5E = Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, "tpu")
# 459 TFLOP/s; 95 GB, of which 95.74 GiB are usable; 2765 GB/s; wires of 1,200 GB/s both ways.
V5P = Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, "tpu")
# 918 TFLOP/s; 32 GB, of which 31.25 GiB are usable; 1638 GB/s; wires of 3,584 Gbit/s.
V6E = Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 448e9, "tpu")

# All single slices up to 512 chips; of v5p, which has many shapes, the common ones.
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_FAMILIES = {"v5e": (V5E, _2D), "v5p": (V5P, _3D), "v6e": (V6E, _2D)}

# JAX takes this part of a GPU's memory at the start, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
_TAKEN = 0.75

# 312 TFLOP/s; 80 GiB; 2,039 GB/s; NVLink of 600 GB/s both ways.
A100 = Chip("a100", int(80 * GIB * _TAKEN), 312e12, 2039e9, 300e9, "gpu")
# 989 TFLOP/s; 80 GiB; 3,350 GB/s; NVLink of 900 GB/s both ways.
H100 = Chip("h100", int(80 * GIB * _TAKEN), 989e12, 3350e9, 450e9, "gpu")
# 989 TFLOP/s; 141 GB; 4,800 GB/s; NVLink of 900 GB/s both ways.
H200 = Chip("h200", int(141e9 * _TAKEN), 989e12, 4800e9, 450e9, "gpu")

_GPUS = {"NVIDIA A100-SXM4-80GB": A100, "NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H200}
_COUNTS = tuple(2**n for n in range(10))
# GPUs of a node have NVLink. Between nodes each has a network adapter: 200 Gbit/s, later 400.
_NODE, _ADAPTER = 8, {"a100": 25e9, "h100": 50e9, "h200": 50e9}


def slices(family: str) -> list[Slice]:
    """Every slice of a family, the smallest first; of GPUs every power of two up to 512.

    Raises:
      ValueError: an unknown family.
    """
    if gpu := next((chip for chip in _GPUS.values() if chip.name == family), None):
        between = replace(gpu, wires=_ADAPTER[family])
        return [Slice(f"{family}:{n}", gpu if n <= _NODE else between, n) for n in _COUNTS]
    if family not in _FAMILIES:
        known = ", ".join((*_FAMILIES, *_ADAPTER))
        raise ValueError(
            f"`--topology`: expected one of {known}, as in v5e:4x4 and h100:8, or {LOCAL}; got "
            f"`{family}`"
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
        unknown = Chip(kind, memory, None, None, None, platform)
        chip = replace(_GPUS.get(kind, unknown), name=kind, memory=memory, platform=platform)
        return Slice(LOCAL, chip, local_chips)
    family = topology.partition(":")[0]
    known = {where.name: where for where in slices(family)}
    if topology not in known:
        raise ValueError(f"`--topology`: expected one of {', '.join(known)}; got `{topology}`")
    return known[topology]
