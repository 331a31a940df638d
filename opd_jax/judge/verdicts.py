"""The verdict on every turn of a batch of conversations: the judge's, or STRONG without a judge.

A turn that failed deterministically gets `Verdict.DET_FAIL`, and the judge is not asked. The
teacher judges the others.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.agent.positions import Positions
from opd_jax.judge.agreement import draw_turns, judge_metrics
from opd_jax.judge.answer import DECODINGS, UNPARSABLE, Judge
from opd_jax.judge.labels import EnvLabels, Judgement, env_labels
from opd_jax.judge.prompt import LABELS
from opd_jax.judge.reading import Question, Reading, answers, open_cache
from opd_jax.losses import Verdict
from opd_jax.model import Params
from opd_jax.runtime import processes, progress


class Verdicts(NamedTuple):
    """What a labeller says of a batch.

    Attributes:
      verdict: int32 [B, K], `Verdict` codes.
      metrics: as (sum, count).
      judgement: what a judge has said; None without one.
      labels: what else is said of turns, name to float32 [B, K].
    """

    verdict: np.ndarray
    metrics: dict[str, Any]
    judgement: Judgement | None = None
    labels: Mapping[str, np.ndarray] = MappingProxyType({})

    @property
    def hidden(self) -> jax.Array | None:
        """See `Judgement.hidden`."""
        return self.judgement.hidden if self.judgement else None


# (conversations, updates done) to what is said of them.
Labeller = Callable[[Sequence[Conversation], int], Verdicts]
# Positions of the student's tokens in each of B conversations, int32 [B, R] (`learner.batch`).
Responses = Callable[[Sequence[Conversation]], np.ndarray]


def no_judge(*, max_turns: int) -> Labeller:
    """Every turn is STRONG, as in plain OPD and fine-tuning."""

    def label(conversations: Sequence[Conversation], update: int):
        return Verdicts(np.full((len(conversations), max_turns), Verdict.STRONG, np.int32), {})

    return label


def teacher_judge(
    params: Params,
    *,
    by: Judge,
    max_turns: int,
    seed: int,
    between: Callable[[], None] | None = None,
    responses: Responses | None = None,
) -> Labeller:
    """The teacher's verdicts. Every `agreement_every` updates the other decoding is asked too.

    It is asked about `agreement_turns` of the turns, drawn by `seed` and the update. For `between`
    see `judge_turns`. With `responses`, which needs the context "history", it also gives the hidden
    states of the tokens there.
    """
    how = by.settings
    (other,) = DECODINGS.keys() - {how.decode}
    by_other = replace(by, settings=replace(how, decode=other))

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        ask, positions = partial(judge_turns, params, conversations, between=between), Positions()
        places = responses(conversations) if responses else None
        judgement = ask(labels, by=by, positions=positions, response=places)
        if update == 0:  # later it is one bad batch, and a resumed run is to go on like any other
            check_some_fit(judgement)
        metrics = judge_metrics(judgement, labels) | positions.metrics
        metrics["tokens/judge"] = positions.tokens("judging")
        if how.agreement_every and update % how.agreement_every == 0:
            drawn = draw_turns(judgement.asked, most=how.agreement_turns, seed=(seed, update))
            second = ask(labels._replace(played=drawn), by=by_other)
            both = judgement.answered & second.answered
            same = (second.verdict == judgement.verdict) & both
            metrics["judge/decodings_agree"] = (same.sum(), both.sum())
            metrics[f"judge/unparsable_{other}"] = (second.unparsable.sum(), second.asked.sum())
        return Verdicts(judgement.verdict, metrics, judgement)

    return label


def judge_turns(
    params: Params,
    conversations: Sequence[Conversation],
    labels: EnvLabels,
    *,
    by: Judge,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
    response: np.ndarray | None = None,
) -> Judgement:
    """Verdicts for every turn of every conversation; `labels` are the environment's of the same.

    A question that, with its answer, exceeds the teacher's positions is not asked; its turn is
    STRONG. `between` is called after every batch of questions; what it raises ends the judging.
    `positions` counts what is computed. `response` are positions of each conversation's tokens,
    int32 [B, R]: with the context "history" all are read, and hidden states before them are kept.

    Source: arXiv 2606.19659, section 3.3. Constrained decoding is ours.
    """
    judged = labels.played & ~labels.failed
    verdict = np.where(labels.failed, Verdict.DET_FAIL, Verdict.SKIP).astype(np.int32)
    unparsable, too_long = np.zeros_like(judged), np.zeros_like(judged)
    scores = np.full((*judged.shape, len(LABELS)), np.nan, np.float32)
    questions: dict[int, list[Question]] = defaultdict(list)
    room = by.model.max_positions - by.answer_tokens
    for row, turn in np.argwhere(judged).tolist():
        conversation = conversations[row]
        prefix = by.prefix(conversation, turn)
        question = [*prefix, *by.question(conversation, turn)]
        if len(question) <= room:
            questions[row].append(Question(turn, len(prefix), question))
        else:
            too_long[row, turn] = True
            _warn(conversation, len(question), by=by)
    rows = len(conversations)
    positions = positions or Positions()
    if response is not None:
        _read_whole(questions, conversations)
    cache = None
    if questions or response is not None:
        cache = open_cache(params, questions, rows, by=by, positions=positions, response=response)
    number = sum(question.turn is not None for turns in questions.values() for question in turns)
    with progress.doing("", total=number, unit="questions") as asked:
        for answered in answers(cache, questions, rows, by=by) if cache else ():
            for place, answer in answered.items():
                unparsable[place] = answer.label == UNPARSABLE
                verdict[place] = answer.label
                if answer.scores is not None:
                    scores[place] = answer.scores
            asked.done += len(answered)
            if between:
                between()
    verdict[unparsable | too_long] = Verdict.STRONG
    hidden = cache.kept() if isinstance(cache, Reading) else None
    return Judgement(verdict, judged & ~too_long, unparsable, too_long, scores, hidden)


def _read_whole(
    questions: dict[int, list[Question]], conversations: Sequence[Conversation]
) -> None:
    """Adds what is left of each conversation after its last question, to be read only."""
    for row, conversation in enumerate(conversations):
        if conversation.broken or not conversation.spans:
            continue
        end = conversation.spans[-1][1]
        if not questions[row] or questions[row][-1].shared < end:
            questions[row].append(Question(None, end, conversation.tokens[:end]))


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
