"""Verdicts of others than a model: labels and rules of the environment, or a user's function."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.envs.base import Rule
from opd_jax.judge.agreement import judge_metrics
from opd_jax.judge.labels import NO_LABEL, EnvLabels, Judgement, env_labels
from opd_jax.judge.prompt import LABELS
from opd_jax.judge.verdicts import Labeller, Verdicts
from opd_jax.losses import Verdict
from opd_jax.runtime import by as named

# What `judge.by` may be, besides `module:function`.
JUDGES = {
    "teacher": "opd_jax.judge.verdicts:teacher_judge",
    "oracle": "opd_jax.judge.others:oracle_judge",
    "failures": "opd_jax.judge.others:failures_judge",
    "record": "opd_jax.judge.others:record_judge",
}


# (conversations, updates done) to `Verdict` codes, integers [B, K], and metrics as (sum, count).
Brought = Callable[[Sequence[Conversation], int], tuple[Any, Mapping[str, Any]]]


def find_judge(by: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that `judge.by` names, which takes `options` besides a `Labeller`'s arguments.

    Raises:
      ValueError: there is none, or it takes other arguments.
    """
    found = named.find(by, JUDGES, section="judge")
    if by in JUDGES:
        return found
    try:
        rest = partial(found, (), 0)
        inspect.signature(rest)
    except (TypeError, ValueError):
        raise ValueError(
            f"`judge.by` = {by!r}: expected a function of (conversations, updates done), as "
            f"`judge.others.Brought`; got {found!r}"
        ) from None
    named.check_arguments(by, rest, options, section="judge")
    return found


def oracle_judge(*, max_turns: int, between: Callable[[], None] | None = None) -> Labeller:
    """The environment's labels as verdicts: a judge that is never wrong.

    A turn that the environment does not label is STRONG, the conservative reading. In the first
    update one turn at least has a label, or ValueError. For `between` see `judge_turns`.
    """

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        labelled = labels.oracle != NO_LABEL
        if update == 0 and (labels.played & ~labels.failed).any() and not labelled.any():
            raise ValueError(
                "`judge.by` = 'oracle': no turn of the first batch has a label; the environment "
                "gives none (`Observation.oracle`)"
            )
        return _judged(np.where(labelled, labels.oracle, Verdict.STRONG), labels, between)

    return label


def failures_judge(*, max_turns: int, between: Callable[[], None] | None = None) -> Labeller:
    """What the environment rejects is DET_FAIL, and everything else SKIP: nobody is asked.

    With `skip_weight` 1 and `fail_weight` 0 the student learns from all turns but the rejected.
    """

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        return _judged(np.full_like(labels.oracle, Verdict.SKIP), labels, between)

    return label


def record_judge(
    *, rule: Rule, max_turns: int, between: Callable[[], None] | None = None
) -> Labeller:
    """An environment's rule as a judge: it sees the record, and nothing that is hidden."""

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        verdict = np.full_like(labels.oracle, Verdict.SKIP)
        for row, k in np.argwhere(labels.played & ~labels.failed).tolist():
            task, turn = conversations[row].task, conversations[row].turns[k]
            assert task is not None  # a row that only fills a batch has no turns
            verdict[row, k] = Verdict[rule(task, turn.record, turn.action)]
        return _judged(verdict, labels, between)

    return label


def brought_judge(
    judge: Brought, *, by: str, max_turns: int, between: Callable[[], None] | None = None
) -> Labeller:
    """A user's function as a judge. Its codes count where a turn was played and did not fail.

    It may return fewer columns than K, if there are no more turns. Every process of a run calls it
    with the same conversations, and it has to give the same codes.

    Args:
      judge: gives `Verdict` codes SKIP, WEAK or STRONG, integers [B, K], and metrics of its own.
      by: its name, for errors.
      max_turns: K.
      between: see `judge_turns`.

    Raises:
      ValueError: what it gives is something else; names `judge.by`.
    """

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        most = max((len(conversation.turns) for conversation in conversations), default=0)
        try:
            codes, metrics = judge(conversations, update)
            codes = np.asarray(codes)
            metrics = dict(metrics)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`judge.by` = {by!r}: expected verdicts [B, K] and a dict of metrics; {error}"
            ) from error
        rows, turns = len(conversations), codes.shape[1] if codes.ndim == 2 else -1
        if codes.shape[:1] != (rows,) or not most <= turns <= max_turns:
            raise ValueError(
                f"`judge.by` = {by!r}: expected verdicts [{rows}, {max_turns}], got the shape "
                f"{list(codes.shape)}"
            )
        verdict = np.full((rows, max_turns), Verdict.SKIP, np.int32)
        judged = labels.played & ~labels.failed
        counted = codes[judged[:, :turns]]
        if codes.dtype.kind not in "iu" or not np.isin(counted, _CODES).all():
            raise ValueError(
                f"`judge.by` = {by!r}: expected the codes {_NAMED}, got "
                f"{np.unique(counted).tolist()[:8]}"
            )
        verdict[:, :turns] = codes
        said = _judged(verdict, labels, between)
        return said._replace(metrics=said.metrics | metrics)

    return label


_CODES = [int(code) for code in (Verdict.SKIP, Verdict.WEAK, Verdict.STRONG)]
_NAMED = ", ".join(f"{code} ({Verdict(code).name})" for code in _CODES)


def _judged(verdict: np.ndarray, labels: EnvLabels, between: Callable[[], None] | None) -> Verdicts:
    """Verdicts with those of failed and missing turns, and the metrics of every judge."""
    if between:
        between()
    judged = labels.played & ~labels.failed
    verdict = np.where(judged, verdict, Verdict.SKIP)
    verdict = np.where(labels.failed, Verdict.DET_FAIL, verdict).astype(np.int32)
    none, no_scores = np.zeros_like(judged), np.full((*judged.shape, len(LABELS)), np.nan)
    judgement = Judgement(verdict, judged, none, none, no_scores)
    return Verdicts(verdict, judge_metrics(judgement, labels), judgement)
