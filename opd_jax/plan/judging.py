"""The programs in which the teacher judges an update's turns."""

from collections.abc import Iterator
from typing import Any

from ml_collections import FrozenConfigDict

from opd_jax.agent.generate import Sampling
from opd_jax.judge import answer as labels
from opd_jax.model import is_sharded
from opd_jax.plan.placement import Placement
from opd_jax.plan.program import Program
from opd_jax.plan.sampling import Player, generating, gone_through, reading
from opd_jax.plan.workload import Workload


def judging(
    config: FrozenConfigDict,
    teacher: Player,
    place: Placement,
    work: Workload,
    *,
    label_width: int,
) -> Iterator[Program]:
    """The programs of `judge.decode` in `judge.context`.

    What `judge.agreement_every` asks for besides, the other decoding, is left out.

    Args:
      label_width: tokens of the longest of the judge's words.
    """
    judge = config.judge
    answer = judge.max_new_tokens if judge.decode == "generate" else label_width
    if judge.context != "history":
        calls = -(-work.rows * work.turns // judge.batch)
        lengths = {"judging": (work.question, calls)}
        if work.longest_question > work.question:
            lengths["judging: longest question"] = (work.longest_question, 0)
        for name, (width, runs) in lengths.items():
            cache = place.cache(
                teacher.sizes, teacher.params, rows=judge.batch, slots=width + answer
            )
            yield from _answering(judge, name, teacher, place, cache, width, answer, runs=runs)
        return
    # Conversations are read in pieces, then the questions behind them.
    piece, width = judge.length_multiple, work.short_question
    rows = min(judge.batch, work.rows)
    calls = -(-work.rows // rows)
    coarse = 4 * piece  # as in `teacher`
    slots = -(-(work.slots + width + answer) // coarse) * coarse
    cache = place.cache(teacher.sizes, teacher.params, rows=rows, slots=slots)
    pieces = calls * -(-work.slots // piece)
    yield reading("judging: conversation", teacher, place, cache, piece, runs=pieces)
    asked = calls * work.turns
    yield from _answering(judge, "judging", teacher, place, cache, width, answer, runs=asked)


def _answering(
    judge: FrozenConfigDict,
    name: str,
    teacher: Player,
    place: Placement,
    cache: Any,
    width: int,
    answer: int,
    *,
    runs: float,
) -> Iterator[Program]:
    """Questions of `width` tokens, one in each row of a cache, and their answers."""
    if judge.decode == "generate":
        greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
        yield reading(name, teacher, place, cache, width, runs=runs)
        name = f"{name}: answer"
        yield generating(name, teacher, place, cache, greedy, answer, runs=runs, read=1)
        return
    words, rows = len(labels.LABELS), cache.lengths.shape[0]
    yield Program(
        name,
        labels.label_scores,
        (
            teacher.params,
            cache,
            place.rows(rows, width),
            place.rows(rows),
            place.whole((words, answer)),
            place.whole((words,)),
        ),
        {"config": teacher.sizes, "sharded": is_sharded(teacher.params)},
        runs=runs,
        trips=None,
        # Each word is read behind the question.
        moved=gone_through(teacher, cache, times=1 + words, read=1),
        beside=teacher.beside,
    )
