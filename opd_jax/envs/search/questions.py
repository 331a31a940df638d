"""Questions with their accepted answers, and panels: the fixed questions of a split.

Questions of a panel are in the order of a hash of their ids. So a panel does not depend on the
order in which files were read, and its first n questions are a fair sample.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: unique and stable, for example `searchqa/nq/test_17`.
      type: its data set, or its kind.
      text: the question.
      answers: every accepted answer; at least one.
      supporting: ids of the passages that together give the answer, in the order in which they are
        needed; empty if they were not recorded.
    """

    id: str
    type: str
    text: str
    answers: tuple[str, ...]
    supporting: tuple[str, ...] = ()


def panel(questions: Iterable[Question], count: int) -> tuple[Question, ...]:
    """The `count` questions whose ids have the smallest SHA-256, in that order; all if fewer.

    Raises:
      ValueError: two questions have one id.
    """
    ordered = sorted(questions, key=lambda question: _sha256(question.id))
    for first, second in itertools.pairwise(ordered):
        if first.id == second.id:
            raise ValueError(f"`id`: expected one question of each id, got {first.id!r} twice")
    return tuple(ordered[:count])


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 over ids, texts and answers in order."""
    lines = ["\t".join((q.id, q.text, *q.answers)) for q in questions]
    return _sha256("\n".join(lines))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
