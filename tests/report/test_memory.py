"""Peaks of memory, against what the process itself allocates."""

import jax
import numpy as np

from opd_jax.report.memory import peak_memory


def test_a_large_array_raises_the_peak_of_the_host_and_freeing_it_does_not_lower_it() -> None:
    before = peak_memory()["peak_gib/host"]
    array = np.ones(int((before + 0.25) * 2**27))  # of 8 bytes: a quarter GiB beyond the peak
    size = array.nbytes / 2**30
    during = peak_memory()["peak_gib/host"]
    assert size <= during < size + before + 0.25
    del array
    assert peak_memory()["peak_gib/host"] >= during


def test_devices_are_named_only_where_they_count() -> None:
    counts = any(device.memory_stats() for device in jax.local_devices())
    assert ("peak_gib/device" in peak_memory()) == counts
