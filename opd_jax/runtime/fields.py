"""Fields of settings: what each affects, and checks of its value.

A section of a config becomes a frozen dataclass that lives in the room that reads it. Its
`__post_init__` checks the values of single fields with the functions below. Relations between
sections are checked in `config.settings`.
"""

from collections.abc import Collection
from typing import Any

# What a field affects. A field without this metadata affects the method.
# What is learnt. A run is only resumed with the same values.
METHOD = "method"
# The length of a run. Schedules depend on it; what an update learns does not.
EXTENT = "extent"
# Memory, speed and the last bits of the same arithmetic.
LAYOUT = "layout"
# The machine and the network: timeouts, processes, how often to save.
WORLD = "world"
# What is measured besides training.
FIGURES = "figures"


def affects(*kinds: str) -> dict[str, frozenset[str]]:
    """The metadata of a field: `dataclasses.field(metadata=affects(LAYOUT))`."""
    return {"affects": frozenset(kinds)}


def check_within(low: float, high: float | None = None, **values: float) -> None:
    """Checks that each value is at least `low` and at most `high`; None is no upper bound.

    Raises:
      ValueError: names the field, the bounds and the value.
    """
    for name, value in values.items():
        if not (low <= value and (high is None or value <= high)):
            expected = f"at least {low}" if high is None else f"{low}..{high}"
            raise ValueError(f"`{name}`: expected {expected}, got {value}")


def check_choice(known: Collection[str], **values: Any) -> None:
    """Checks that each value is one of `known`.

    Raises:
      ValueError: names the field, the choices and the value.
    """
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")
