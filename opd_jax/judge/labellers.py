"""Where the verdicts of an update come from: the teacher, or nobody."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.judge.agreement import judge_metrics
from opd_jax.judge.labels import env_labels
from opd_jax.judge.prompt import Judge
from opd_jax.judge.verdicts import judge_turns
from opd_jax.losses import Verdict
from opd_jax.model import Params

# (conversations, updates done) to `Verdict` codes int32 [B, K] and metrics as (sum, count).
Labeller = Callable[[Sequence[Conversation], int], tuple[np.ndarray, dict[str, Any]]]


def no_judge(*, max_turns: int) -> Labeller:
    """Every turn is STRONG, as in plain OPD and fine-tuning."""

    def label(conversations: Sequence[Conversation], update: int):
        return np.full((len(conversations), max_turns), Verdict.STRONG, np.int32), {}

    return label


def teacher_judge(params: Params, *, by: Judge, max_turns: int) -> Labeller:
    """The teacher's verdicts. Every `agreement_every` updates the other decoding is asked too."""
    ask = partial(judge_turns, params, by=by, max_turns=max_turns)
    how = by.settings

    def label(conversations: Sequence[Conversation], update: int):
        judgement = ask(conversations, decode=how.decode)
        metrics = judge_metrics(judgement, env_labels(conversations, max_turns=max_turns))
        if how.agreement_every and update % how.agreement_every == 0:
            other = "generate" if how.decode == "constrained" else "constrained"
            second = ask(conversations, decode=other)
            answered = judgement.asked & ~judgement.unparsable & ~second.unparsable
            same = (second.verdict == judgement.verdict) & answered
            metrics["judge/decodings_agree"] = (same.sum(), answered.sum())
            metrics[f"judge/unparsable_{other}"] = (second.unparsable.sum(), second.asked.sum())
        return judgement.verdict, metrics

    return label
