"""Fields of settings: what each affects, and checks of its value.

A section of a config becomes a frozen dataclass that lives in the room that reads it. Its
`__post_init__` checks the values of single fields with the functions below. Relations between
sections are checked in `config.settings`.
"""

from collections.abc import Collection
from typing import Any

# What a change of a field changes; a field without such metadata affects the method.
# The method: what is learnt. Resuming asks for the same.
METHOD = "method"
# How long a run is. Schedules depend on it, what is learnt in an update does not.
EXTENT = "extent"
# How the same arithmetic is laid out: memory, speed and the last bits.
LAYOUT = "layout"
# What the machine and the network provide: timeouts, processes, how often to save.
WORLD = "world"
# What is measured beside training.
FIGURES = "figures"


def affects(*kinds: str) -> dict[str, frozenset[str]]:
    """The metadata of a field: `dataclasses.field(metadata=affects(LAYOUT))`."""
    return {"affects": frozenset(kinds)}


def check_within(low: float, high: float | None = None, **values: float) -> None:
    """Each value is at least `low` and at most `high`; None for no upper bound.

    Raises:
      ValueError: names the field, the bounds and the value.
    """
    for name, value in values.items():
        if not (low <= value and (high is None or value <= high)):
            expected = f"at least {low}" if high is None else f"{low}..{high}"
            raise ValueError(f"`{name}`: expected {expected}, got {value}")


def check_choice(known: Collection[str], **values: Any) -> None:
    """Each value is one of `known`.

    Raises:
      ValueError: names the field, the choices and the value.
    """
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")
