"""What the process is doing, how far it is and how long it takes.

A terminal has a bar. A log has a line whenever nothing was printed for a minute. Both go to stderr,
in the first process only. A thread writes them, so they come while a program compiles too.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from opd_jax.runtime import processes
from opd_jax.runtime.exits import print_line

# A log that is silent for so long gets a line.
SILENT_S = 60.0
# How often the thread looks.
_LOOK_S = 1.0


@dataclass
class Doing:
    """Something that takes long.

    Attributes:
      name: what it is; "" for a part that only counts.
      total: how many there are to do; 0 if that is not known.
      unit: what is counted, such as "episodes".
      done: how many are done. Whoever does them counts here.
      start: when it began, of `time.monotonic`.
    """

    name: str
    total: int = 0
    unit: str = ""
    done: int = 0
    start: float = field(default_factory=time.monotonic)


_doing: list[Doing] = []  # from the outermost on
_thread: threading.Thread | None = None


@contextlib.contextmanager
def doing(name: str, *, total: int = 0, unit: str = "") -> Iterator[Doing]:
    """Tells of the block as long as it takes; count `done` of what it gives."""
    one = begin(name, total=total, unit=unit)
    try:
        yield one
    finally:
        end(one)


def begin(name: str, *, total: int = 0, unit: str = "") -> Doing:
    """As `doing`, for what does not end in the block in which it begins; see `end`."""
    global _thread
    one = Doing(name, total, unit)
    _doing.append(one)
    if _thread is None and processes.is_first():
        _thread = threading.Thread(target=_tell, name="progress", daemon=True)
        _thread.start()
    return one


def end(one: Doing) -> None:
    """Ends what `begin` gave. If it has ended already, nothing happens."""
    with contextlib.suppress(ValueError):
        _doing.remove(one)


def describe(parts: list[Doing], now: float) -> str:
    """A line such as ``"update 3: rollout: 5 of 16 episodes, 01:10 so far, 02:34 left"``.

    `parts` are what is being done, from the outermost on; `now` is a time of `time.monotonic`. The
    time left is that of the innermost part, if it goes on as it went.
    """
    last, words = parts[-1], [part.name for part in parts if part.name]
    if last.total:
        words.append(f"{last.done} of {last.total} {last.unit}")
    passed = now - last.start
    text = f"{': '.join(words)}, {tqdm.format_interval(round(passed))} so far"
    if 0 < last.done < last.total:
        left = passed / last.done * (last.total - last.done)
        text += f", {tqdm.format_interval(round(left))} left"
    return text


def _tell() -> None:
    """The thread: keeps the bar of a terminal, or prints the lines of a log."""
    bar: tqdm | None = None
    while True:
        time.sleep(_LOOK_S)
        parts, now = list(_doing), time.monotonic()
        if not sys.stderr.isatty():
            if parts and processes.silent_s() >= SILENT_S:
                processes.spoke()
                print_line(describe(parts, now), sys.stderr)
        elif not parts:
            if bar is not None:
                bar.close()
                bar = None
        else:
            if bar is None:
                how: dict[str, Any] = dict(leave=False, file=sys.stderr, dynamic_ncols=True)
                bar = tqdm(bar_format="{desc}", **how)
            bar.set_description_str(_bar(parts, now, bar.ncols or 80))


def _bar(parts: list[Doing], now: float, columns: int) -> str:
    """The line of a terminal: of what is counted a bar."""
    last = parts[-1]
    if not last.total:
        return describe(parts, now)[: columns - 1]
    name = ": ".join(part.name for part in parts if part.name)
    passed = now - last.start
    return tqdm.format_meter(
        last.done, last.total, passed, ncols=columns - 1, prefix=name, unit=f" {last.unit}"
    )
