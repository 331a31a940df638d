"""Measures the seconds that an update spends in each of its parts."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jax import monitoring, profiler

from opd_jax.runtime import progress

_compiled_s = 0.0  # by this process so far


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    global _compiled_s
    if event.startswith("/jax/core/compile/"):  # tracing and lowering too
        _compiled_s += duration_secs


monitoring.register_event_duration_secs_listener(_on_event)


class Stopwatch:
    """Seconds of the named parts of an update, with compilation counted apart.

    JAX traces and compiles inside the part that first meets a shape. That time is subtracted from
    the part and added to `compile_s`. In a trace of `jax.profiler` a part is named `prefix` + its
    name.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.seconds: dict[str, float] = {}
        self.compile_s = 0.0

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        start, compiled_before = time.perf_counter(), _compiled_s
        name = self._prefix + part
        with profiler.TraceAnnotation(name), progress.doing(name):
            yield
        compiled = _compiled_s - compiled_before
        elapsed = time.perf_counter() - start - compiled
        self.compile_s += compiled
        self.seconds[part] = self.seconds.get(part, 0.0) + max(elapsed, 0.0)
