"""Which signal this process got, for code that knows no JAX."""

import contextlib
import os
import signal
import types

_came = ""  # the first signal's name; one for all, as signals are the process's


def signalled() -> str:
    """The name of the signal that this process got inside a `stop.Stop`; "" if none.

    For long work of one process alone: cut it short, then let all processes call `Stop.check`,
    since others may not have got one.
    """
    return _came


def remember(number: int, frame: types.FrameType | None) -> None:
    """A handler: remembers the signal; a second SIGINT then ends the process at once."""
    global _came
    _came = _came or signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not `print`: the signal may have come inside one.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this turn; Ctrl-C again leaves at once\n")


def forget() -> None:
    """As if none had come."""
    global _came
    _came = ""
