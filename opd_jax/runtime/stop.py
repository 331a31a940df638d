"""SIGTERM: a machine that is about to be taken away gives notice."""

import signal

from opd_jax.runtime import processes


class Stop:
    """Whether SIGTERM came, to any process of the run."""

    def __init__(self) -> None:
        self._came = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._came = True

    def anywhere(self) -> bool:
        """Whether it came to any process of the run. All processes have to call this."""
        return any(processes.gather(self._came))

    def exit_if_set(self) -> None:
        """Ends the command where it came during an evaluation, of which nothing else is lost.

        Raises:
          SystemExit: with status 0.
        """
        if self.anywhere():
            processes.say("stopped by SIGTERM; started again, the run goes on with its evaluation")
            raise SystemExit(0)
