"""The programs with which the teacher judges an update's turns."""

from collections.abc import Iterator
from typing import Any

from opd_jax.agent.generate import Sampling
from opd_jax.config.settings import Settings
from opd_jax.judge.answer import label_scores
from opd_jax.judge.prompt import LABELS
from opd_jax.plan.program import Program
from opd_jax.plan.sampling import Player
from opd_jax.plan.workload import Workload


def judging(
    settings: Settings, teacher: Player, work: Workload, *, label_width: int
) -> Iterator[Program]:
    """The programs of `judge.context` and `judge.decode`.

    The second decoding that `judge.agreement_every` asks for is left out.

    Args:
      label_width: most tokens of a label's word.
    """
    judge = settings.judge
    length = judge.max_new_tokens if judge.decode == "generate" else label_width

    def answers(name: str, cache: Any, width: int, runs: float) -> Iterator[Program]:
        """A question of `width` tokens in each row of a cache, and its answer."""
        if judge.decode == "generate":
            greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
            yield teacher.read(name, cache, width, runs=runs)
            yield teacher.sample(f"{name}: answer", cache, greedy, length, runs=runs)
            return
        words = [
            teacher.place.replicated(shape) for shape in ((len(LABELS), length), (len(LABELS),))
        ]
        # The model reads the question, then each label's word.
        times, rows = 1 + len(LABELS), [(width,), ()]
        yield teacher.program(name, label_scores, cache, rows, *words, runs=runs, times=times)

    if judge.context == "history":
        # Conversations are read in pieces, then questions are asked after them.
        piece, width = judge.length_multiple, work.short_question
        rows = min(judge.batch, work.rows)
        calls = -(-work.rows // rows)
        multiple = 4 * piece  # as `judge.verdicts` rounds its caches
        slots = -(-(work.slots + width + length) // multiple) * multiple
        cache = teacher.cache(rows=rows, slots=slots)
        pieces = -(-work.slots // piece)
        yield teacher.read("judging: conversation", cache, piece, runs=calls * pieces)
        yield from answers("judging", cache, width, calls * work.turns)
        return
    widths = {"judging": (work.question, -(-work.rows * work.turns // judge.batch))}
    if work.longest_question > work.question:
        widths["judging: longest question"] = (work.longest_question, 0)
    for name, (width, runs) in widths.items():
        cache = teacher.cache(rows=judge.batch, slots=width + length)
        yield from answers(name, cache, width, runs)
