"""SIGTERM and SIGINT: the process must leave soon, with what is finished."""

import os
import signal
import types
from typing import Self

from opd_jax.runtime import processes
from opd_jax.runtime.exits import Stopped

_came = ""  # the first signal's name; one for all, as signals are the process's


def signalled() -> str:
    """The name of the signal that this process got inside a `Stop`; "" if none.

    For long work of one process alone: cut it short, then let all processes call `Stop.check`,
    since others may not have got one.
    """
    return _came


class Stop:
    """Remembers SIGTERM (a machine is about to be preempted) and SIGINT (Ctrl-C) while entered.

    Long work calls `check` between its parts: turns of a rollout, batches of the judge's questions.
    A signal alone interrupts nothing, so arrays and files are always whole. A second SIGINT ends
    the process at once.
    """

    def __enter__(self) -> Self:
        signals = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, _remember) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        global _came
        _came = ""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Stopped` if any process of the run got a signal. Every process has to call it."""
        if came := next(filter(None, processes.gather(_came)), ""):
            processes.say(f"stopped by {came}; what is finished is kept")
            raise Stopped


def _remember(number: int, frame: types.FrameType | None) -> None:
    global _came
    _came = _came or signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not `print`: the signal may have come inside one.
        os.write(2, b"\nstopping after this turn; Ctrl-C again leaves at once\n")
