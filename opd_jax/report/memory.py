"""The most memory that this process has used so far, on its devices and on the host."""

import resource
import sys

import jax

_GIB = 2**30
# `ru_maxrss` counts KiB, and on macOS bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory() -> dict[str, float]:
    """Peaks in GiB since the process began; they never fall.

    Returns:
      `peak_gib/device`: the largest of this process's devices, by `jax.Device.memory_stats`; left
      out where the backend has none, as on a CPU. `peak_gib/host`: the process's resident set.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    of_devices = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    peaks = {"peak_gib/host": host / _GIB}
    if of_devices:
        peaks["peak_gib/device"] = max(of_devices) / _GIB
    return peaks
