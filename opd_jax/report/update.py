"""One update's line of `metrics.jsonl`: how episodes went, what was learnt, where the time went."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.judge.agreement import VERDICT_NAMES
from opd_jax.learner.objective import Objective
from opd_jax.losses import NO_TURN
from opd_jax.report.metrics import means
from opd_jax.report.progress import progress_line
from opd_jax.report.stopwatch import Stopwatch


def episode_metrics(
    conversations: Sequence[Conversation], rows: Sequence[Conversation]
) -> dict[str, Any]:
    """How the batch's episodes went, as (sum, count).

    Those whose environment broke are counted in `end/broken` and left out of everything else.

    Args:
      conversations: the batch's episodes.
      rows: the sequences made of them, for the counts of tokens.
    """
    ends = Counter(c.end for c in conversations)
    played = [c for c in conversations if not c.broken]
    n = len(played)
    turns = [turn for c in played for turn in c.turns]
    stops = Counter(turn.stop for turn in turns)
    sampled = sum(turn != NO_TURN for row in rows if not row.broken for turn in row.turn_id)
    return {
        "batch/success": (sum(c.success for c in played), n),
        "batch/score": (sum(c.score for c in played), n),
        "batch/turns": (len(turns), n),
        "batch/repeated": (sum(c.repeated_actions for c in played), len(turns)),
        "batch/failed": (sum(bool(turn.failure) for turn in turns), len(turns)),
        **{
            f"end/{end}": (ends[end], len(conversations))
            for end in sorted({"success", "turn_limit", "context", *ends})
        },
        **{
            f"stop/{stop}": (stops[stop], len(turns))
            for stop in ("stop_token", "turn_budget", "context")
        },
        "tokens/sampled": sampled,
        "tokens/sequence": sequence_tokens(rows),
    }


def sequence_tokens(rows: Sequence[Conversation]) -> int:
    """Tokens of the rows, without padding."""
    return sum(len(row.tokens) for row in rows)


def unmeasured(objective: Objective, *, on_policy: bool) -> set[str]:
    """Metrics that such updates do not compute: left out, since they are not zero.

    Args:
      objective: what is minimized.
      on_policy: whether the tokens are the student's own samples.
    """
    names: set[str] = set()
    if not objective.confidence:
        names |= {"confidence", "by_turn/confidence"}
    if not objective.needs_teacher:
        names |= {"teacher_entropy"}
    if objective.scope == "trajectory":  # each trajectory has a Z of its own
        names |= {"z", "raw_weight", "by_turn/raw_weight"}
    if not on_policy:
        names |= {"logprob_error"}
    return names


def update_metrics(
    raw: Mapping[str, Any],
    played: Mapping[str, Any],
    clock: Stopwatch,
    *,
    leave_out: Collection[str],
) -> dict[str, Any]:
    """One update's line of `metrics.jsonl`.

    Args:
      raw: what the train step returned, on the host.
      played: of the episodes and the judge, (sum, count) or scalars.
      clock: where the time went.
      leave_out: see `unmeasured`.
    """
    sums = raw["sums"]
    totals = sums.totals
    found = means(
        {
            **played,
            "divergence": (sums.divergence.sum(), totals.tokens),
            "raw_weight": (totals.weight, totals.tokens),
            "active_tokens": (totals.active, totals.tokens),
            "confidence": (sums.confidence.sum(), sums.turns.sum()),
            "student_entropy": (sums.student_entropy, totals.tokens),
            "teacher_entropy": (sums.teacher_entropy, totals.tokens),
            "tokens/student": totals.tokens,
            "by_turn/divergence": (sums.divergence, sums.tokens_by_turn),
            "by_turn/raw_weight": (sums.weight_by_turn, sums.tokens_by_turn),
            "by_turn/confidence": (sums.confidence, sums.turns),
            "by_turn/turns": (sums.turns, np.ones_like(sums.turns)),
            **{name: raw[name] for name in ("loss", "z", "grad_norm", "update_norm")},
            "logprob_error": sums.logprob_error,
            **{f"seconds/{part}": seconds for part, seconds in clock.seconds.items()},
            "seconds/compile": clock.compile_s,
        }
    )
    for part, tokens in (("rollout", "tokens/sampled"), ("update", "tokens/sequence")):
        count, seconds = found.get(tokens), clock.seconds.get(part)
        if isinstance(count, float) and seconds:
            found[f"tokens_per_s/{part}"] = count / seconds
    return {name: mean for name, mean in found.items() if name not in leave_out}


def describe(metrics: Mapping[str, Any], *, update: int, updates: int) -> str:
    """The line about an update that is printed."""
    shares = {
        name: metrics[f"verdict/{name}"]
        for name in VERDICT_NAMES.values()
        if f"verdict/{name}" in metrics
    }
    return progress_line(
        step=update,
        total_steps=updates,
        loss=metrics["loss"],
        success=metrics.get("batch/success"),
        verdicts=shares,
        tokens_per_s=metrics.get("tokens_per_s/update"),
        seconds_per_step=sum(
            seconds
            for name, seconds in metrics.items()
            if name.startswith("seconds/") and name != "seconds/compile"
        ),
    )


def check_finite(raw: Mapping[str, Any], *, update: int, checkpoints: object) -> None:
    """Raises where an update left the finite numbers.

    Raises:
      ValueError: names the figure, the update and where the last good checkpoint is.
    """
    for name in ("loss", "grad_norm", "update_norm"):
        if not np.isfinite(raw[name]):
            raise ValueError(
                f"`{name}` is {raw[name]} at update {update}: nothing was saved from it, the last "
                f"checkpoint in {checkpoints} is good; lower `optimizer.learning_rate`, or look at "
                "the update's line in metrics.jsonl"
            )
