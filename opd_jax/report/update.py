"""One update's line of `metrics.jsonl`: how episodes went, what was learnt, where the time went."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from opd_jax.agent.conversation import Actor, Conversation
from opd_jax.learner.objective import Objective
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.report.memory import peak_memory
from opd_jax.report.metrics import means
from opd_jax.report.stopwatch import Stopwatch


def episode_metrics(
    conversations: Sequence[Conversation], rows: Sequence[Conversation]
) -> dict[str, Any]:
    """How the batch's episodes went, as (sum, count).

    Those whose environment broke are counted in `end/broken`, those that did not fit in
    `end/context`. Both are left out of everything else.
    `rows` are the sequences made of the episodes; their tokens are counted.
    """
    ends = Counter(c.end for c in conversations)
    played = [c for c in conversations if not c.broken]
    n = len(played)
    turns = [turn for c in played for turn in c.turns]
    stops = Counter(turn.stop for turn in turns)
    sampled = sum(turn != NO_TURN for row in rows if not row.broken for turn in row.turn_id)
    by = Counter(turn.actor for turn in turns)
    by_teacher = [
        end - start
        for c in played
        for turn, (start, end) in zip(c.turns, c.spans, strict=False)
        if turn.actor is Actor.TEACHER
    ]
    return {
        "batch/success": (sum(c.success for c in played), n),
        "batch/score": (sum(c.score for c in played), n),
        "batch/turns": (len(turns), n),
        "batch/repeated": (sum(c.repeated_actions for c in played), len(turns)),
        "batch/failed": (sum(bool(turn.failure) for turn in turns), len(turns)),
        "batch/by_teacher": (by[Actor.TEACHER], len(turns)),
        "batch/replayed": (by[Actor.REPLAY], len(turns)),
        **{
            f"end/{end}": (ends[end], len(conversations))
            for end in sorted({"success", "turn_limit", "context", *ends})
        },
        **{
            f"stop/{stop}": (stops[stop], len(turns))
            for stop in sorted({"stop_token", "turn_budget", "context", "invented_turn", *stops})
        },
        "tokens/sampled": sampled,
        "tokens/by_teacher": sum(by_teacher),
        "tokens/sequence": sum(len(row.tokens) for row in rows),
    }


def unmeasured(
    objective: Objective, *, on_policy: bool, replays: bool, teacher_plays: bool
) -> set[str]:
    """Names of metrics that updates do not compute, or that can only be zero: they are left out.

    Args:
      objective: what is minimized.
      on_policy: the tokens are the student's own samples.
      replays: episodes begin with turns of recorded ones.
      teacher_plays: the teacher may take turns of the student's episodes.
    """
    names: set[str] = set()
    if not objective.weight.labels:  # nobody judges
        names |= {"seconds/judge"}
    if not objective.weight.reads_confidence:
        names |= {"confidence", "by_turn/confidence"}
    if not objective.needs_teacher:
        names |= {"teacher_entropy"}
    if objective.scope == "trajectory":  # each trajectory has a Z of its own
        names |= {"z", "raw_weight", "by_turn/raw_weight"}
    if not on_policy:
        names |= {"logprob_error"}
    if not replays:
        names |= {"batch/replayed"}
    if not teacher_plays:
        names |= {"batch/by_teacher", "tokens/by_teacher", "tokens/read_by_teacher"}
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
      played: metrics of the episodes and the judge, as (sum, count) or scalars.
      clock: the update's seconds.
      leave_out: names of metrics to leave out (`unmeasured`).
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
            **{name: raw[name] for name in ("loss", "z", "grad_norm", "update_norm", "no_step")},
            "logprob_error": sums.logprob_error,
            **{f"seconds/{part}": seconds for part, seconds in clock.seconds.items()},
            "seconds/compile": clock.compile_s,
            **peak_memory(),
        }
    )
    for part, tokens in (("rollout", "tokens/sampled"), ("update", "tokens/sequence")):
        count, seconds = found.get(tokens), clock.seconds.get(part)
        if isinstance(count, float) and seconds:
            found[f"tokens_per_s/{part}"] = count / seconds
    return {name: mean for name, mean in found.items() if name not in leave_out}


def describe(metrics: Mapping[str, Any], *, update: int, updates: int) -> str:
    """One line about an update: how far the run is, how it does, how long it still takes.

    Such as ``"12/200  loss 0.4321  success 25%  skip 50% weak 20%  1.23k tok/s  03:08 left"``. What
    was not measured is left out.
    """
    parts = [f"{update:>{len(str(updates))}}/{updates}", f"loss {metrics['loss']:.4f}"]
    if (success := metrics.get("batch/success")) is not None:
        parts.append(f"success {success:.0%}")
    names = [verdict.name.lower() for verdict in Verdict]
    shares = {name: metrics.get(f"verdict/{name}") for name in names}
    verdicts = [f"{name} {share:.0%}" for name, share in shares.items() if share is not None]
    if verdicts:
        parts.append(" ".join(verdicts))
    if (speed := metrics.get("tokens_per_s/update")) is not None:
        parts.append(f"{tqdm.format_sizeof(speed)} tok/s")
    # Not every update compiles or looks at episodes, so these do not count for the time left.
    seconds = sum(metrics.get(f"seconds/{part}", 0.0) for part in ("rollout", "judge", "update"))
    left = tqdm.format_interval(round(seconds * (updates - update)))
    return "  ".join([*parts, f"{left} left"])


def check_finite(
    raw: Mapping[str, Any], *, update: int, checkpoints: Path | None, where: str = ""
) -> None:
    """Checks that loss and norms are finite; `where` says in words where they stop being that.

    Raises:
      ValueError: one is not; names it, the update and the folder of the last good checkpoint, if
        there is one.
    """
    good = f", the last checkpoint in {checkpoints} is good" if checkpoints else ""
    for name in ("loss", "grad_norm", "update_norm"):
        if not np.isfinite(raw[name]):
            # A change of parameters is of no token.
            hint = "" if name == "update_norm" else (where or "`debug.nans` names the token") + "; "
            raise ValueError(
                f"`{name}` is {raw[name]} at update {update}: nothing was saved from it{good}; "
                f"{hint}lower `optimizer.learning_rate`, or look at the update's line in "
                "metrics.jsonl"
            )
