"""How long a run takes from its start to its first sampled token and to its first update."""

import time

from opd_jax.runtime import processes

_start = time.perf_counter()
_reached: dict[str, float] = {}


def begin() -> None:
    """Starts the clock of a run; a comparison has several."""
    global _start
    _start = time.perf_counter()
    _reached.clear()


def passed() -> float:
    """Seconds since the run's start."""
    return time.perf_counter() - _start


def reached(what: str) -> None:
    """Says how long a run took to its first `what`. Later calls with this name do nothing."""
    if what not in _reached:
        _reached[what] = passed()
        processes.say(f"first {what} after {_reached[what]:.1f} s")


def seconds() -> dict[str, float]:
    """`first/WHAT`: seconds from the run's start, of all that it has reached."""
    return {f"first/{what}": after for what, after in _reached.items()}
