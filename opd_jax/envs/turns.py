"""What all environments do in a turn: count it, read its response, list what is admissible."""

import re
from collections.abc import Sequence

NOT_RUNNING = "`step` needs a running episode; call `reset` first."
MORE = " (+%d more)"


class TurnClock:
    """Counts the turns of an episode, and knows whether one is running.

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
        """Begin an episode."""
        self._turns = 0
        self._running = True

    def tick(self) -> None:
        """Begin a turn; ValueError if no episode is running."""
        if not self._running:
            raise ValueError(NOT_RUNNING)
        self._turns += 1

    def end(self, why: str) -> str:
        """Decide whether the episode is over. A second call in the same turn returns the same.

        Args:
          why: why this turn ends the episode, as in `Observation.end`; "" if it does not.

        Returns:
          `why` if given, else "turn_limit" in the last turn, else "": the episode goes on.
        """
        if not why and self._turns >= self._max_turns:
            why = "turn_limit"
        self._running = not why
        return why

    def stop(self) -> None:
        """End the episode at once."""
        self._running = False


def own_words(response: str, others: re.Pattern[str]) -> tuple[str, bool]:
    """What a response says itself: after the thinking it opens with, before another's words.

    A model may go on after its action and make up the environment's answer and turns that follow.
    No turn stands for that text, so nothing in it may be carried out.

    Args:
      response: the model's whole text.
      others: how words of the environment or the user begin.

    Returns:
      The text, and whether another's words follow it.
    """
    thought, ended, rest = response.partition("</think>")
    # The prompt may have opened the thinking; then only its end is in the response.
    opened = thought.lstrip().startswith("<think>") or (ended and "<think>" not in thought)
    spoken = rest if opened else response
    found = others.search(spoken)
    return (spoken[: found.start()], True) if found else (spoken, False)


def listed(commands: Sequence[str], most: int) -> str:
    """The first `most` commands and the number of the rest, such as `open, look (+3 more)`."""
    line = ", ".join(commands[:most])
    return line + MORE % (len(commands) - most) if len(commands) > most else line
