"""The question that the judge is asked about a turn.

It holds the teacher's role, a rubric for three words, and the fields of the paper's Table 9. These
do not say what was tried before, so going back to a place looks as good as going to a new one. Two
contexts do. With "history" the question follows the conversation, and holds only what that does
not. With "record" it holds what the environment has recorded, in place of the last observation.

A file of the user's may take the place of role, rubric, fields and words (`read_prompt`).
"""

import functools
import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opd_jax.agent.conversation import Turn
from opd_jax.envs.base import Task
from opd_jax.envs.turns import listed
from opd_jax.losses import Verdict
from opd_jax.runtime import bucket

# The words of an answer.
LABELS = ("SKIP", "WEAK", "STRONG")
# The fixed lines of the prompt. The wording is ours; the fields and the rubric's meaning are the
# paper's (Table 9).
ROLE = (
    "You are a gatekeeper. Decide whether the agent's proposed action needs correction by its "
    "teacher."
)
RUBRIC = (
    "Answer with one word. SKIP: the action is reasonable, as good as what you would prefer, or "
    "too ambiguous to correct. WEAK: it may be suboptimal, but that is uncertain or of low impact. "
    "STRONG: it is clearly wrong, off task, redundant or likely to fail."
)
PROPOSAL = "Agent's response: {turn.response}"
TABLE_9 = (
    "Task type: {task.type}\n"
    "Goal: {task.goal}\n"
    "Scene: {task.scene}\n"
    "Observation: {turn.observation}\n"
    "Admissible actions: {admissible}\n" + PROPOSAL
)
# What only grows comes first: a question is read from where it differs from the one before.
RECORD = (
    "Tried: {record.tried}\nSeen: {record.seen}\nChanged: {record.changed}\nHeld: {record.held}"
)
# Which fields each context has.
FIELDS = {
    "table9": TABLE_9,
    "+feedback": TABLE_9 + "\nFeedback: {turn.feedback}",
    "history": "Admissible actions: {admissible}",
    "record": "Goal: {task.goal}\n" + RECORD + "\n" + PROPOSAL,
}
# Of each list of a record the latest entries are shown, and of an entry its beginning.
ENTRIES, LETTERS = 30, 240
BEFORE = "(+%d before) "

# All fixed text of a prompt, for a tokenizer that is built around it.
PHRASES = ("\n".join([ROLE, RUBRIC, re.sub("{.*?}", "", FIELDS["+feedback"])]), *LABELS)


def judge_prompt(task: Task, turn: Turn, *, admissible_shown: int, context: str) -> str:
    """The question about one turn.

    Args:
      admissible_shown: most admissible actions to list; the rest are counted.
      context: "table9": what the student saw and wrote; "+feedback": also what the environment
        answered (the paper's section 3.3 mentions it, its Table 9 does not); "history": only what
        the conversation does not hold, for a question that follows it; "record": the goal, the
        environment's record before the turn (`Told`), and what the student wrote.
    """
    fields = _filled(FIELDS[context], task, turn, admissible_shown)
    return "\n".join([ROLE, RUBRIC, fields])


class Told(NamedTuple):
    """The lists of a record (`envs.base.Records`), each as one line."""

    seen: str
    held: str
    changed: str
    tried: str


def told(turn: Turn) -> Told:
    """What the environment had recorded before the turn."""
    return Told(*(_line(turn.record.get(name, ())) for name in Told._fields))


def _filled(text: str, task: Task, turn: Turn, admissible_shown: int) -> str:
    admissible = listed(turn.admissible, admissible_shown)
    return text.format(task=task, turn=turn, admissible=admissible, record=told(turn))


def _line(entries: Sequence[str]) -> str:
    """The last `ENTRIES`, behind the number of those before them: `(+2 before) a; b`."""
    shown = [entry[:LETTERS] + "..." * (len(entry) > LETTERS) for entry in entries[-ENTRIES:]]
    before = BEFORE % (len(entries) - ENTRIES) if len(entries) > ENTRIES else ""
    return before + ("; ".join(shown) or "nothing")


# --- A prompt of the user's ---------------------------------------------------------------------

# The fields that a file may name, in braces.
NAMED = (
    *("task.type", "task.goal", "task.scene"),
    *("turn.observation", "turn.response", "turn.action", "turn.feedback"),
    *(f"record.{name}" for name in Told._fields),
    "admissible",
)


@dataclass(frozen=True)
class Prompt:
    """A question, and the words that answer it.

    Attributes:
      words: what an answer may be.
      verdicts: the `Verdict` code of each word.
      text: the question with fields in braces (`NAMED`); "" for that of `judge_prompt`.
    """

    words: tuple[str, ...] = LABELS
    verdicts: tuple[int, ...] = tuple(int(Verdict[label]) for label in LABELS)
    text: str = ""

    def question(self, task: Task, turn: Turn, *, admissible_shown: int, context: str) -> str:
        """The question about one turn; for the arguments see `judge_prompt`."""
        if not self.text:
            return judge_prompt(task, turn, admissible_shown=admissible_shown, context=context)
        return _filled(self.text, task, turn, admissible_shown)

    def reads_record(self, context: str) -> bool:
        """Whether the question shows the environment's record of the episode."""
        return any(name.startswith("record.") for name in _fields(self.text or FIELDS[context]))

    @property
    def fingerprint(self) -> str:
        """A hash of all that it says."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read_prompt(path: str) -> Prompt:
    """The prompt in a text file, in a bucket too, from where it is read once; "" is the paper's.

    The file begins with a line `WORD = VERDICT` for each word that an answer may be. The verdict is
    SKIP, WEAK or STRONG, and so the word's weight `weight.skip_weight`, `weak_weight` or 1. After
    an empty line comes the question, with fields in braces (`NAMED`); a brace of its own is
    doubled.

    Raises:
      ValueError: there is no such file, or it is written otherwise; names `judge.prompt`.
      Away: its bucket cannot be reached now.
    """
    if not path:
        return Prompt()
    where = f"`judge.prompt` = {path!r}"
    read = _text_once if path.startswith(bucket.SCHEME) else _text
    try:
        lines, _, text = read(path).strip().partition("\n\n")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected a file of text: {error}") from None
    pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*(SKIP|WEAK|STRONG)\s*", x) for x in lines.splitlines()]
    words = [pair[1].upper() for pair in pairs if pair]
    if not all(pairs) or len(set(words)) < len(words) or len(words) < 2 or not text:
        raise ValueError(
            f"{where}: expected a line `WORD = SKIP`, `WORD = WEAK` or `WORD = STRONG` for each of "
            f"two words or more, an empty line, and the question; its first lines are {lines!r}"
        )
    try:
        fields = _fields(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; a brace of the text itself is doubled") from None
    if strange := [name for name in fields if name not in NAMED]:
        raise ValueError(f"{where}: no field {{{strange[0]}}}; expected {', '.join(NAMED)}")
    verdicts = tuple(int(Verdict[pair[2]]) for pair in pairs if pair)
    return Prompt(tuple(pair[1] for pair in pairs if pair), verdicts, text)


def _text(path: str) -> str:
    return bucket.place(path, name="judge.prompt").read_text("utf-8")


# A run asks what it has fingerprinted, also if somebody replaces the object meanwhile.
_text_once = functools.cache(_text)


def _fields(text: str) -> list[str]:
    """The names in braces; ValueError if a brace stands alone."""
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
