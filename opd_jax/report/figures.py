"""The figures of a panel of episodes, their average over splits, and the tables that tell them.

`summarize` makes them, `evaluate` stores them as `{who: {split: figures}}` in `summary.json`, and
the tables read that.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.report.intervals import average_interval, mean_interval, wilson_interval
from opd_jax.report.writers import table


def summarize(conversations: Sequence[Conversation]) -> dict[str, object]:
    """The figures of a panel of episodes.

    Episodes whose environment broke say nothing of who played: they are counted, and left out.

    Returns:
      `success` (share), `ci95` (Wilson interval of it), `score` and `score_ci95` (mean), `turns`
      (mean), `repeated` (share of turns that repeat an earlier action of their episode), `failed`
      (share of turns that failed deterministically), `n`, the number of those `broken`, which
      `n` leaves out, and `measures`, the mean of each of the environment's, 0 for an episode
      without it.

    Raises:
      ValueError: none is left.
    """
    played = [c for c in conversations if not c.broken]
    n = len(played)
    if not n:
        raise ValueError(
            f"`env`: the environments of all {len(conversations)} episodes broke; the warnings "
            "above say how"
        )
    wins = sum(c.success for c in played)
    turns = sum(len(c.turns) for c in played)
    scores = [c.score for c in played]
    measures = {name for c in played for name in c.measures}
    return {
        "success": wins / n,
        "ci95": list(wilson_interval(wins, n)),
        "score": float(np.mean(scores)),
        "score_ci95": list(mean_interval(scores)),
        "turns": turns / n,
        "repeated": sum(c.repeated_actions for c in played) / max(turns, 1),
        "failed": sum(bool(t.failure) for c in played for t in c.turns) / max(turns, 1),
        "n": n,
        "broken": len(conversations) - n,
        "measures": {m: sum(c.measures.get(m, 0.0) for c in played) / n for m in sorted(measures)},
    }


def macro_average(parts: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The means of figures over splits, each counting the same whatever its size.

    Args:
      parts: as from `summarize`.

    Returns:
      The same figures, with intervals from those of the parts (`intervals.average_interval`); `n`
      and `broken` are sums.
    """

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    def interval(of: str, ends: str) -> list[float]:
        return list(average_interval([(part[of], *part[ends]) for part in parts]))

    means = ("success", "score", "turns", "repeated", "failed")
    return {
        **{name: mean(part[name] for part in parts) for name in means},
        "ci95": interval("success", "ci95"),
        "score_ci95": interval("score", "score_ci95"),
        **{name: sum(part[name] for part in parts) for name in ("n", "broken")},
        "measures": {
            name: mean(part["measures"][name] for part in parts) for name in parts[0]["measures"]
        },
    }


def split_label(split: str, figures: Mapping[str, Any]) -> str:
    """A split's name in tables, with the label of its digest: `valid_seen (generated)`."""
    label = figures.get("digest", "").rpartition("-")[0]
    return f"{split} ({label})" if label else split


def results_table(results: dict[str, dict]) -> str:
    """A markdown table of `{who: {split: figures}}`, and below it who never acted at all.

    Scores are shown where they say more than success, and the environment's measures where it has
    any.
    """
    results = {who: _present(splits) for who, splits in results.items()}
    every = [r for splits in results.values() for r in splits.values()]
    scored = ["score"] if any(r["score"] != r["success"] for r in every) else []
    measured = sorted({name for r in every for name in r["measures"]})
    rows = [
        {
            "who": who,
            "split": split_label(split, r),
            "success": f"{r['success']:.1%}",
            "95 % interval": f"{r['ci95'][0]:.1%} to {r['ci95'][1]:.1%}",
            "score": f"{r['score']:.2f}",
            **{name: f"{value:.3f}" for name, value in r["measures"].items()},
            "turns": f"{r['turns']:.1f}",
            "repeated": f"{r['repeated']:.1%}",
            "failed": f"{r['failed']:.1%}",
            "n": r["n"],
            "broken": r.get("broken", 0),
        }
        for who, splits in results.items()
        for split, r in splits.items()
    ]
    columns = ["who", "split", "success", "95 % interval", *scored, *measured]
    columns += ["turns", "repeated", "failed", "n"]
    if any(row["broken"] for row in rows):
        columns.append("broken")
    idle = [
        f"{who} on {split_label(split, r)}: no turn held an action that could be carried out."
        for who, splits in results.items()
        for split, r in splits.items()
        if r["failed"] == 1.0
    ]
    return "\n\n".join([table(rows, columns), *idle])


def judge_table(results: dict[str, dict]) -> str:
    """A markdown table of the judge's figures in `{who: {split: figures}}`; "" without any."""
    rows = [
        {
            "turns of": who,
            "split": split_label(split, r),
            "balanced accuracy": f"{j['balanced_accuracy']:.2f}",
            "95 % interval": f"{j['ci95'][0]:.2f} to {j['ci95'][1]:.2f}",
            "always SKIP": f"{j['always_skip']:.2f}",
            "precision": "" if j["precision"] is None else f"{j['precision']:.2f}",
            "recall": "" if j["recall"] is None else f"{j['recall']:.2f}",
            "n": j["n"],
        }
        for who, splits in results.items()
        for split, r in _present(splits).items()
        if (j := r.get("judge"))
    ]
    return table(rows, list(rows[0])) if rows else ""


def _present(splits: Mapping[str, Any]) -> dict[str, Any]:
    return {split: figures for split, figures in splits.items() if figures is not None}
