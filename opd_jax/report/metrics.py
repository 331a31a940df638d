"""Metrics as (sum, count), and their means."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def means(values: Mapping[str, Any]) -> dict[str, float | list[float | None]]:
    """Divides each metric's sum by its count.

    Ratios stay (sum, count) until they are written. So a mean over micro-batches or hosts is the
    mean over everything, not a mean of means.

    Args:
      values: name to (sum, count), or to a scalar x, which means (x, 1). Sum and count are numbers,
        or arrays [K] for quantities by turn index. They are divided in float64.

    Returns:
      Name to mean. A scalar with count 0 is left out: it was not observed. An array becomes a list,
      with None where the count is 0.

    Raises:
      ValueError: sum and count differ in shape, or have more than one dimension.
    """
    found: dict[str, float | list[float | None]] = {}
    for name, value in values.items():
        total, count = value if isinstance(value, tuple) else (value, np.ones(np.shape(value)))
        # Adding 0.0 turns -0.0 into 0.0.
        total, count = np.asarray(total, np.float64) + 0.0, np.asarray(count, np.float64)
        if total.shape != count.shape or total.ndim > 1:
            raise ValueError(
                f"metric `{name}` expects sum and count of one shape, [] or [K]; got "
                f"{total.shape} and {count.shape}"
            )
        if total.ndim == 1:
            pairs = zip(total.tolist(), count.tolist(), strict=True)
            found[name] = [part / n if n else None for part, n in pairs]
        elif count:
            found[name] = float(total / count)
    return found
