"""The figures of a panel of episodes, and their average over splits.

`evaluate` stores them in `summary.json` as `{who: {split: figures}}`; `tables` shows them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.agent.conversation import Conversation, check_some_played
from opd_jax.report.intervals import average_interval, mean_interval, wilson_interval


def summarize(conversations: Sequence[Conversation]) -> dict[str, object]:
    """The figures of a panel of episodes.

    An episode whose environment broke says nothing about the player, nor does one that did not fit
    the context. It is counted as `broken` and left out of everything else.

    Returns:
      success: share of episodes that succeeded; `ci95`: its Wilson interval.
      score: mean score; `score_ci95`: its interval.
      turns: mean turns of an episode.
      repeated: share of turns that repeat an earlier action of their episode.
      failed: share of turns that failed deterministically.
      n, broken: number of episodes that did not break, and that did.
      wins: a character for each task, in order: 1 if it was solved, 0 if not, - if it broke.
      measures: name to mean of each measure of the environment; an episode without it counts 0.

    Raises:
      ValueError, WorldFailed: every episode is broken (`check_some_played`).
    """
    check_some_played(conversations)
    played = [c for c in conversations if not c.broken]
    n = len(played)
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
        "wins": "".join("-" if c.broken else str(int(c.success)) for c in conversations),
        "measures": {m: sum(c.measures.get(m, 0.0) for c in played) / n for m in sorted(measures)},
    }


def macro_average(parts: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The mean of figures of `summarize` over splits, each with the same weight.

    Intervals come from those of the parts (`intervals.average_interval`); `n` and `broken` are
    sums.
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
