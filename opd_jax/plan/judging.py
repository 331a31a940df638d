"""The programs with which the teacher judges an update's turns."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from opd_jax.agent.contexts import width_of
from opd_jax.agent.generate import Sampling
from opd_jax.config.settings import Settings
from opd_jax.judge.answer import label_scores
from opd_jax.judge.prompt import LABELS
from opd_jax.judge.reading import SLOTS
from opd_jax.plan.placement import device_bytes
from opd_jax.plan.program import Program
from opd_jax.plan.sampling import Player, rows_read
from opd_jax.plan.workload import Workload


def judging(
    settings: Settings, teacher: Player, work: Workload, *, label_width: int
) -> Iterator[Program]:
    """The programs of `judge.context` and `judge.decode`.

    The second decoding that `judge.agreement_every` asks for is left out. Where hidden states are
    kept (`judge.reading`), they take memory beside each program.

    Args:
      label_width: most tokens of a label's word.
    """
    judge = settings.judge
    length = judge.max_new_tokens if judge.decode == "generate" else label_width
    rows = min(judge.batch, work.rows)
    slots = -(-(work.longest_question + length) // SLOTS) * SLOTS
    cache = teacher.cache(rows=rows, slots=slots)
    kept = 0
    if settings.judges_what_it_scores:
        shape = work.rows, work.response, teacher.sizes.d_model
        dtype = teacher.params["embed"].dtype
        kept = device_bytes(teacher.place.rows(*shape, dtype=dtype))  # as many as in decoding
    at_once = rows_read(settings, judge.prefill_rows, rows)
    # Each conversation's first question is read whole, of each later one what is new in it.
    pieces = Counter(_pieces(work.question, judge.extend_widths))
    for width in _pieces(work.new_in_question, judge.extend_widths):
        pieces[width] += work.turns - 1
    for width, count in sorted(pieces.items(), reverse=True):
        name, runs = f"judging: {width} tokens of a question", work.rows / at_once * count
        read = teacher.read(name, cache, width, rows=at_once, runs=runs)
        yield replace(read, temporaries=kept)
    runs = work.rows / rows * work.turns
    if judge.decode == "generate":
        greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
        said = teacher.sample("judging: answer", cache, greedy, length, runs=runs)
        yield replace(said, temporaries=kept)
        return
    words = [teacher.place.replicated(shape) for shape in ((len(LABELS), length), (len(LABELS),))]
    # The model reads the question's last token, then each label's word.
    times = 1 + len(LABELS) if length > 1 else 1
    said = teacher.program(
        "judging: answer", label_scores, cache, [(), ()], *words, runs=runs, times=times
    )
    yield replace(said, temporaries=kept)


def _pieces(length: int, widths: Sequence[int]) -> Iterator[int]:
    """The widths in which so many tokens are read, as `agent.contexts` reads them."""
    while length > 0:
        yield (width := width_of(length, widths))
        length -= width
