"""SIGTERM: the notice that the machine is about to be preempted."""

import signal

from opd_jax.runtime import processes


class Stop:
    """Remembers SIGTERM, which any process of a run may get."""

    def __init__(self) -> None:
        self._came = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._came = True

    def anywhere(self) -> bool:
        """Whether any process of the run got SIGTERM. Every process has to call this."""
        return any(processes.gather(self._came))

    def exit_if_set(self) -> None:
        """Ends the command with status 0 if SIGTERM came; called between parts of an evaluation."""
        if self.anywhere():
            processes.say("stopped by SIGTERM; started again, the run goes on with its evaluation")
            raise SystemExit(0)
