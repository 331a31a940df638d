"""What environments do alike in every turn: count it, and list what can be done next."""

from collections.abc import Sequence

NOT_RUNNING = "`step` needs a running episode; call `reset` first."
MORE = " (+%d more)"


class TurnClock:
    """Counts the turns of one episode at a time, and knows whether one is running.

    Args:
      max_turns: an episode ends after this many.

    Raises:
      ValueError: `max_turns` is below 1.
    """

    def __init__(self, max_turns: int):
        if max_turns < 1:
            raise ValueError(f"`max_turns` must be at least 1; got {max_turns}.")
        self._max_turns = max_turns
        self._turns = 0
        self._running = False

    def start(self) -> None:
        """An episode begins."""
        self._turns = 0
        self._running = True

    def tick(self) -> None:
        """A turn begins; ValueError if no episode is running."""
        if not self._running:
            raise ValueError(NOT_RUNNING)
        self._turns += 1

    def end(self, why: str) -> str:
        """Settle whether the episode is over; asked again in the same turn, the answer is the same.

        Args:
          why: it is over whatever the number of turns, in the words of `Observation.end`; "" if it
            is not.

        Returns:
          `why`, or else "turn_limit" in the last turn, or else "": the episode goes on.
        """
        if not why and self._turns >= self._max_turns:
            why = "turn_limit"
        self._running = not why
        return why

    def stop(self) -> None:
        """No episode is running from here on."""
        self._running = False


def listed(commands: Sequence[str], most: int) -> str:
    """The first `most` commands in a line, and how many more there are: `open, look (+3 more)`."""
    line = ", ".join(commands[:most])
    return line + MORE % (len(commands) - most) if len(commands) > most else line
