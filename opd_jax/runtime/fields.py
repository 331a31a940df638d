"""Fields of settings: what each affects, and checks of its value.

Each section of a config is a frozen dataclass in the package that uses it. Its `__post_init__`
checks single fields with the functions below. Relations between sections are checked in
`config.settings`.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

# Each field names what it affects; the default is METHOD.
# METHOD changes what is learnt; must be equal to resume.
METHOD = "method"
# EXTENT changes the length of the run; must be equal to resume, because schedules depend on it.
EXTENT = "extent"
# LAYOUT changes memory, speed and rounding.
LAYOUT = "layout"
# WORLD is about the machine and the network: timeouts, processes, how often to save.
WORLD = "world"
# FIGURES changes what is measured besides training.
FIGURES = "figures"


def affects(*kinds: str) -> dict[str, frozenset[str]]:
    """The metadata of a field: `dataclasses.field(metadata=affects(LAYOUT))`."""
    return {"affects": frozenset(kinds)}


def check_within(low: float, high: float | None = None, **values: float) -> None:
    """ValueError unless each value is at least `low` and at most `high` (None: any finite one)."""
    for name, value in values.items():
        if not (low <= value < math.inf and (high is None or value <= high)):
            expected = f"at least {low}" if high is None else f"{low}..{high}"
            if value == math.inf:
                expected = "a finite number"
            raise ValueError(f"`{name}`: expected {expected}, got {value}")


def check_choice(known: Collection[str], **values: Any) -> None:
    """ValueError unless each value is one of `known`."""
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")


def check_widths(extend_widths: Sequence[int]) -> None:
    """Checks that widths ascend; ValueError otherwise."""
    widths = list(extend_widths)
    if not widths or widths != sorted(set(widths)) or widths[0] < 1:
        raise ValueError(f"`extend_widths`: expected ascending widths, got {widths}")
