"""SIGTERM, SIGINT and SIGHUP: the process must leave soon, with what is finished."""

import signal
from typing import Self

from opd_jax.runtime import processes
from opd_jax.runtime.exits import Stopped
from opd_jax.runtime.signals import forget, remember, signalled


class Stop:
    """Remembers SIGTERM (a machine is about to be preempted), SIGINT and SIGHUP while entered.

    Long work calls `check` between its parts: turns of a rollout, batches of the judge's questions.
    A signal alone interrupts nothing, so arrays and files are always whole. A second SIGINT ends
    the process at once.
    """

    def __enter__(self) -> Self:
        signals = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            signals.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, remember) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        forget()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Stopped` if any process of the run got a signal. Every process has to call it."""
        if came := next(filter(None, processes.gather(signalled())), ""):
            processes.say(f"stopped by {came}; what is finished is kept")
            raise Stopped
