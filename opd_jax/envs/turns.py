"""What all environments do in a turn: count it, read text, list what is admissible."""

import re
import textwrap
from collections.abc import Sequence

NOT_RUNNING = "`step` needs a running episode; call `reset` first."
MORE = " (+%d more)"
REJECTED = "Nothing happens."  # in records; the household and ALFWorld say so themselves
_FEW = 80  # characters of a command, and of how it ended

# Who speaks next in ReAct-like formats, and what their turn may be called.
_SPEAKERS = r"observation|obs|environment|env|system|tool|feedback|user|human"
_MESSAGES = r"observation|response|output|result|feedback|message"
# Thinking that a response opens with. The prompt may have opened it; then only its end is there.
_THINK = re.compile(r"\s*<think>.*?(?:</think>|\Z)|(?:(?!<think>).)*?</think>", re.DOTALL)
# A thought block that is not closed ends where the action begins.
_THOUGHT = re.compile(
    r"\s*<thought>.*?(?:</thought>|(?=<action>|^[ \t]*action:)|\Z)",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
# A model may go on in the line of its action. No command holds that word.
_IN_LINE = re.compile(
    r"^[ \t]*action:[^\n]*?\S[ \t]+(?=obs(?:ervation)?[ \t#\d]*:)", re.IGNORECASE | re.MULTILINE
)


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


def invented_turn(*, others: Sequence[str] = (), own: Sequence[str] = ()) -> re.Pattern[str]:
    """Finds where text pretends to be the environment's or the user's (`Env.invented`).

    It looks only where a line starts or an action block has ended, so a sentence may name anyone.
    Found are a speaker with a colon (`Observation 1:`, `**User**:`), as a heading of its own line
    or in brackets or tags (`<tool_response>`), and the marks of chat templates written as text.

    Args:
      others: words with which this environment's messages begin, besides the usual speakers.
      own: words for the model itself, besides `assistant`. A response may begin with one.
    """
    speakers = rf"(?:{'|'.join([_SPEAKERS, *others])})(?:[ _-]?(?:{_MESSAGES}))?"
    itself = f"(?:{'|'.join(['assistant', *own])})"
    marks = r"[ \t]*(?:<\|(?!\w*think)\w+\|>|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>)"
    turn = rf"{_opening(speakers)}|(?!\A)(?:{_opening(itself)})|{marks}"
    return re.compile(rf"(?:^|(?<=</action>))(?:{turn})", re.MULTILINE | re.IGNORECASE)


def _opening(speaker: str) -> str:
    """A pattern for the ways in which a line says who speaks."""
    named = rf"{speaker}[ \t#\d*_]*"  # it may have a number
    return rf"[ \t#*_]*{named}:|[ \t]*[#*_][ \t#*_]*{named}\n|[ \t]*(?:\[|</?){named}[\]>]"


def before_invented_turn(response: str, invented: re.Pattern[str]) -> tuple[str, bool]:
    """The part of a response that acts: after the thinking it opens with, before an invented turn.

    A model may go on after its action and invent the environment's answer and turns that follow.
    No turn stands for that text, so nothing in it may be carried out.

    Args:
      response: the model's whole text.
      invented: where an invented turn begins (`invented_turn`).

    Returns:
      The text, and whether an invented turn follows it.
    """
    start = 0
    for thinking in (_THINK, _THOUGHT):
        if found := thinking.match(response, start):
            start = found.end()
    spoken = response[start:].lstrip()
    turn, line = invented.search(spoken), _IN_LINE.search(spoken)
    begun = [*([turn.start()] if turn else []), *([line.end()] if line else [])]
    return (spoken[: min(begun)], True) if begun else (spoken, False)


def encodable(text: str) -> str:
    """The text with `?` for each lone surrogate, such as half an emoji, which UTF-8 cannot encode.

    Scraped pages and JSON have them, and a tokenizer refuses them.
    """
    return text.encode("utf-8", "replace").decode()


def listed(commands: Sequence[str], most: int) -> str:
    """The first `most` commands and the number of the rest, such as `open, look (+3 more)`."""
    line = ", ".join(commands[:most])
    return line + MORE % (len(commands) - most) if len(commands) > most else line


def tried(command: str, ending: str) -> str:
    """A command and how it ended, for a record (`base.Records`). Cuts what is long."""
    return f"{_short(command)}: {_short(ending)}"


def first_sentence(text: str) -> str:
    """The first sentence of an observation."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


def _short(text: str) -> str:
    return textwrap.shorten(text, _FEW, placeholder=" ...")
