"""The verdict on every turn of a batch of conversations: the judge's, or STRONG without a judge.

A turn that failed deterministically gets `Verdict.DET_FAIL`, and the judge is not asked. The
teacher judges the others.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from opd_jax.agent.contexts import ContextCache
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.positions import Positions
from opd_jax.judge.agreement import draw_turns, judge_metrics
from opd_jax.judge.answer import DECODINGS, UNPARSABLE, Judge
from opd_jax.judge.labels import EnvLabels, Judgement, env_labels
from opd_jax.losses import Verdict
from opd_jax.model import Params
from opd_jax.runtime import processes
from opd_jax.runtime.mesh import DECODING, shards

# (conversations, updates done) to `Verdict` codes int32 [B, K] and metrics as (sum, count).
Labeller = Callable[[Sequence[Conversation], int], tuple[np.ndarray, dict[str, Any]]]


def no_judge(*, max_turns: int) -> Labeller:
    """Every turn is STRONG, as in plain OPD and fine-tuning."""

    def label(conversations: Sequence[Conversation], update: int):
        return np.full((len(conversations), max_turns), Verdict.STRONG, np.int32), {}

    return label


def teacher_judge(
    params: Params,
    *,
    by: Judge,
    max_turns: int,
    seed: int,
    between: Callable[[], None] | None = None,
) -> Labeller:
    """The teacher's verdicts. Every `agreement_every` updates the other decoding is asked too.

    It is asked about `agreement_turns` of the turns, drawn by `seed` and the update. For `between`
    see `judge_turns`.
    """
    how = by.settings
    (other,) = DECODINGS.keys() - {how.decode}
    by_other = replace(by, settings=replace(how, decode=other))

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        ask, positions = partial(judge_turns, params, conversations, between=between), Positions()
        judgement = ask(labels, by=by, positions=positions)
        if update == 0:  # later it is one bad batch, and a resumed run is to go on like any other
            check_some_fit(judgement)
        metrics = judge_metrics(judgement, labels) | positions.metrics
        if how.agreement_every and update % how.agreement_every == 0:
            drawn = draw_turns(judgement.asked, most=how.agreement_turns, seed=(seed, update))
            second = ask(labels._replace(played=drawn), by=by_other)
            both = judgement.answered & second.answered
            same = (second.verdict == judgement.verdict) & both
            metrics["judge/decodings_agree"] = (same.sum(), both.sum())
            metrics[f"judge/unparsable_{other}"] = (second.unparsable.sum(), second.asked.sum())
        return judgement.verdict, metrics

    return label


def judge_turns(
    params: Params,
    conversations: Sequence[Conversation],
    labels: EnvLabels,
    *,
    by: Judge,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
) -> Judgement:
    """Verdicts for every turn of every conversation; `labels` are the environment's of the same.

    A question that, with its answer, exceeds the teacher's positions is not asked; its turn is
    STRONG. `between` is called after every batch of questions; what it raises ends the judging.
    `positions` counts what is computed.

    Source: arXiv 2606.19659, section 3.3. Constrained decoding is ours.
    """
    judged = labels.played & ~labels.failed
    verdict = np.where(labels.failed, Verdict.DET_FAIL, Verdict.SKIP).astype(np.int32)
    unparsable, too_long = np.zeros_like(judged), np.zeros_like(judged)
    questions: dict[int, dict[int, list[int]]] = defaultdict(dict)
    room = by.model.max_positions - by.answer_tokens
    for row, turn in np.argwhere(judged).tolist():
        conversation = conversations[row]
        question = [*by.prefix(conversation, turn), *by.question(conversation, turn)]
        if len(question) <= room:
            questions[row][turn] = question
        else:
            too_long[row, turn] = True
            _warn(conversation, len(question), by=by)
    rows = len(conversations)
    for answers in _answers(params, questions, rows, by=by, positions=positions or Positions()):
        for place, label in answers.items():
            unparsable[place] = label == UNPARSABLE
            verdict[place] = label
        if between:
            between()
    verdict[unparsable | too_long] = Verdict.STRONG
    return Judgement(verdict, judged & ~too_long, unparsable, too_long)


def check_some_fit(judgement: Judgement) -> None:
    """Checks that not every question was too long; ValueError otherwise."""
    if judgement.too_long.any() and not judgement.asked.any():
        raise ValueError(
            f"`judge`: none of {judgement.too_long.sum()} questions fits the teacher's positions; "
            f"{REMEDY}"
        )


REMEDY = (
    "lower `judge.admissible_shown`, or `rollout.context_tokens` with `judge.context` = history"
)


def _warn(conversation: Conversation, length: int, *, by: Judge) -> None:
    name = conversation.task.id if conversation.task else ""
    processes.warn(
        "`judge`: turns of %s are STRONG without a question, since one of %d tokens and %d more "
        "exceed the teacher's %d positions; %s",
        *(name, length, by.answer_tokens, by.model.max_positions, REMEDY),
    )


# Of each conversation's turns, in order.
Questions = Mapping[int, Mapping[int, list[int]]]

# The cache's slots are a multiple of this: few sizes, since each is a program to compile.
SLOTS = 512


def _answers(
    params: Params, questions: Questions, most: int, *, by: Judge, positions: Positions
) -> Iterator[dict[tuple[int, int], int]]:
    """Labels by (conversation, turn), of a batch of questions after another.

    Each row of a cache is asked the questions of one conversation, turn by turn, then those of
    another one. Only what a question does not share with the row's last one is read: first the
    judge's role and the task are shared, then with "history" the conversation so far.

    `most` is the number of conversations, whether there are questions about them or not: else the
    number of rows, and with it what is compiled, would depend on the update.
    """
    if not questions:
        return
    how, ways = by.settings, shards("batch", rules=DECODING)
    rows = min(how.batch, -(-most // ways) * ways)
    longest = max(len(tokens) for turns in questions.values() for tokens in turns.values())
    cache = ContextCache(
        params,
        sizes=by.model,
        rows=rows,
        slots=-(-(longest + by.answer_tokens) // SLOTS) * SLOTS,
        widths=how.extend_widths,
        rows_read=how.prefill_rows,
        positions=positions,
        purpose="judging",
    )
    # Those with most turns first, so that all rows end at about the same time.
    order = sorted(questions, key=lambda row: -len(questions[row]))
    waiting = deque(deque((row, turn) for turn in questions[row]) for row in order)
    asking: list[deque[tuple[int, int]]] = [deque()] * rows
    while True:
        places: dict[int, tuple[int, int]] = {}
        for row in range(rows):
            if not asking[row] and waiting:
                asking[row] = waiting.popleft()
            if asking[row]:
                places[row] = asking[row].popleft()
        if not places:
            return
        last, asked = np.zeros((2, rows), np.int32)
        for row, (conversation, turn) in places.items():
            tokens = questions[conversation][turn]
            cache.put(row, tokens)
            last[row], asked[row] = tokens[-1], 1
        cache.read(places)
        labels = DECODINGS[how.decode](cache, last, asked, by=by)
        yield {place: labels[row] for row, place in places.items()}
