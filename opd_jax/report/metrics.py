"""What a run measures: metrics as (sum, count), and the seconds of the parts of an update.

A ratio is kept as its sum and its count until it is written, so that the mean over micro-batches or
hosts is the mean over everything, not a mean of means.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


class Metrics:
    """Accumulates named sums and counts.

    A value is a (sum, count) pair, or a plain scalar x, which stands for (x, 1). Sum and count may
    be arrays [K] of the same shape, for quantities by turn index. Sums are float64.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds each pair of `values` to the pair kept under its name.

        Args:
          values: name to a (sum, count) tuple or a scalar; jax and numpy arrays are accepted.

        Raises:
          ValueError: sum and count differ in shape, or in shape from what was added before.
        """
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value, np.ones(np.shape(value)))
            total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
            before_total, before_count = self._totals.get(
                name, (np.zeros_like(total), np.zeros_like(count))
            )
            shapes = {total.shape, count.shape, before_total.shape}
            if len(shapes) > 1 or total.ndim > 1:
                raise ValueError(
                    f"metric `{name}` expects sum and count of one shape, [] or [K], the same in "
                    f"every call; got {total.shape} and {count.shape} after {before_total.shape}"
                )
            self._totals[name] = (before_total + total, before_count + count)

    def means(self) -> dict[str, float | list[float | None]]:
        """Divides every sum by its count.

        Returns:
          Name to mean. A scalar whose count is 0 is left out, since it was not observed and is not
          zero. An array becomes a list with None where the count is 0.
        """
        means: dict[str, float | list[float | None]] = {}
        for name, (total, count) in self._totals.items():
            if total.ndim == 1:
                pairs = zip(total.tolist(), count.tolist(), strict=True)
                means[name] = [part / n if n else None for part, n in pairs]
            elif count:
                means[name] = float(total / count)
        return means


class Stopwatch:
    """Seconds of named parts of an update, with compilation counted apart.

    Compilation happens inside whichever part first meets a shape; what JAX reports of it is taken
    out of that part and summed in `compile_s`.
    """

    _compile_s = 0.0  # of the process so far
    _listening = False

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.compile_s = 0.0
        if not Stopwatch._listening:
            jax.monitoring.register_event_duration_secs_listener(Stopwatch._on_event)
            Stopwatch._listening = True

    @staticmethod
    def _on_event(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            Stopwatch._compile_s += duration_secs

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`; a part may be measured more than once."""
        start, compiled = time.perf_counter(), Stopwatch._compile_s
        yield
        compiled = Stopwatch._compile_s - compiled
        elapsed = time.perf_counter() - start - compiled
        self.compile_s += compiled
        self.seconds[part] = self.seconds.get(part, 0.0) + max(elapsed, 0.0)
