"""The programs with which the teacher judges an update's turns."""

from collections.abc import Iterator

from opd_jax.agent.generate import Sampling
from opd_jax.config.settings import Settings
from opd_jax.judge.answer import label_scores
from opd_jax.judge.prompt import LABELS
from opd_jax.judge.verdicts import SLOTS
from opd_jax.plan.program import Program
from opd_jax.plan.sampling import Player, rows_read
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
    rows = min(judge.batch, work.rows)
    slots = -(-(work.longest_question + length) // SLOTS) * SLOTS
    cache = teacher.cache(rows=rows, slots=slots)
    at_once = rows_read(settings, judge.prefill_rows, rows)
    # Each conversation's first question is read whole, of each later one what is new in it.
    widths = judge.extend_widths
    new = next((width for width in widths if width >= work.new_in_question), widths[-1])
    calls = work.rows / at_once
    first = calls * -(-work.question // widths[-1])
    later = calls * (work.turns - 1) * -(-work.new_in_question // new)
    if new == widths[-1]:
        later += first
    else:
        name = "judging: first question"
        yield teacher.read(name, cache, widths[-1], rows=at_once, runs=first)
    yield teacher.read("judging: question", cache, new, rows=at_once, runs=later)
    runs = work.rows / rows * work.turns
    if judge.decode == "generate":
        greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
        yield teacher.sample("judging: answer", cache, greedy, length, runs=runs)
        return
    words = [teacher.place.replicated(shape) for shape in ((len(LABELS), length), (len(LABELS),))]
    # The model reads the question's last token, then each label's word.
    times = 1 + len(LABELS) if length > 1 else 1
    yield teacher.program(
        "judging: answer", label_scores, cache, [(), ()], *words, runs=runs, times=times
    )
