"""How far a judge's verdicts agree with the labels of an environment that knows the truth.

An environment's oracle labels a turn SKIP, WEAK or STRONG from hidden knowledge, such as the exact
distance to the goal. The judge never sees those labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.judge.labels import NO_LABEL, EnvLabels, Judgement
from opd_jax.judge.prompt import LABELS
from opd_jax.losses import Verdict

_RESAMPLES = 1000


def confusion(judgement: Judgement, oracle: np.ndarray) -> np.ndarray:
    """Counts of turns by the oracle's label [B, K] and the judge's, over turns that have both.

    Returns:
      int64 [B, 3, 3]: conversation, oracle's label, judge's label, in the order of `LABELS`.
    """
    counts = np.zeros((len(oracle), len(LABELS), len(LABELS)), np.int64)
    row, turn = np.nonzero(judgement.asked & (oracle != NO_LABEL))
    np.add.at(counts, (row, oracle[row, turn], judgement.verdict[row, turn]), 1)
    return counts


def precision(counts: np.ndarray) -> tuple[int, int]:
    """(part, whole): of the turns that the judge wants corrected, how many are not fine.

    The judge wants WEAK and STRONG turns corrected. A turn is fine if the oracle calls it SKIP.
    `counts` are [3, 3], the oracle's label by the judge's.
    """
    return counts[1:, 1:].sum(), counts[:, 1:].sum()


def recall(counts: np.ndarray) -> tuple[int, int]:
    """(part, whole): of the turns that are not fine, how many the judge wants corrected."""
    return counts[1:, 1:].sum(), counts[1:].sum()


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """The share of turns that the judge labels as the oracle does, averaged over oracle labels.

    Labels that do not occur are left out. A judge with one constant answer scores 1/n, with n
    labels occurring. From counts [..., 3, 3] to float [...]; nan where nothing was counted.
    """
    of_label = counts.sum(axis=-1)
    right = np.diagonal(counts, axis1=-2, axis2=-1) / np.maximum(of_label, 1)
    occurring = (of_label > 0).sum(axis=-1)
    return np.where(occurring, right.sum(axis=-1) / np.maximum(occurring, 1), np.nan)


def figures(counts: np.ndarray) -> dict[str, object]:
    """The judge's figures over a panel of episodes, from the counts of `confusion`.

    Returns:
      `balanced_accuracy` and its `ci95`, a bootstrap over episodes, since the turns of one episode
      are alike; `always_skip`, the balanced accuracy of a judge that finds everything fine;
      `precision` and `recall`, None for 0 / 0; `n`, the number of turns. If that is 0, since every
      turn failed deterministically, all others are None.
    """
    if not counts.any():
        names = ("balanced_accuracy", "ci95", "always_skip", "precision", "recall")
        return dict.fromkeys(names) | {"n": 0}
    total = counts.sum(axis=0)
    drawn = np.random.default_rng(0).integers(len(counts), size=(_RESAMPLES, len(counts)))
    resampled = balanced_accuracy(counts[drawn].sum(axis=1))
    always_skip = np.zeros_like(total)
    always_skip[:, Verdict.SKIP] = total.sum(axis=1)
    return {
        "balanced_accuracy": float(balanced_accuracy(total)),
        "ci95": [float(x) for x in np.nanquantile(resampled, [0.025, 0.975])],
        "always_skip": float(balanced_accuracy(always_skip)),
        "precision": _share(*precision(total)),
        "recall": _share(*recall(total)),
        "n": int(total.sum()),
    }


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def draw_turns(asked: np.ndarray, *, most: int, seed: Sequence[int]) -> np.ndarray:
    """A sample of the turns in `asked`, bool [B, K], as such an array: `most` of them, or all.

    Every turn is as likely as any other, so what is measured on the sample is unbiased.
    """
    turns = np.argwhere(asked)
    drawn = np.random.default_rng(seed).permutation(turns)[:most]
    sample = np.zeros_like(asked)
    sample[tuple(drawn.T)] = True
    return sample


def judge_metrics(judgement: Judgement, labels: EnvLabels) -> dict[str, Any]:
    """Shares of verdicts, over all turns and by turn index, and agreement with the oracle.

    Returns:
      Name to (sum, count) or to a scalar. Under `by_turn/` these are arrays [K].
    """
    exists = labels.played
    metrics: dict[str, Any] = {
        "judge/asked": (judgement.asked.sum(), exists.sum()),
        "judge/too_long": (judgement.too_long.sum(), exists.sum()),
        "judge/unparsable": (judgement.unparsable.sum(), judgement.asked.sum()),
    }
    for verdict in Verdict:
        name = verdict.name.lower()
        given = (judgement.verdict == verdict) & exists
        metrics[f"verdict/{name}"] = (given.sum(), exists.sum())
        metrics[f"by_turn/{name}"] = (given.sum(axis=0), exists.sum(axis=0))
    counts = confusion(judgement, labels.oracle).sum(axis=0)
    if counts.any():
        metrics["judge/precision"] = precision(counts)
        metrics["judge/recall"] = recall(counts)
        # The two denominators, so that precision and recall can be pooled over updates.
        metrics["judge/corrected"] = metrics["judge/precision"][1]
        metrics["judge/wrong"] = metrics["judge/recall"][1]
        for row, label in enumerate(LABELS):
            metrics[f"judge/recall_{label.lower()}"] = (counts[row, row], counts[row].sum())
    return metrics
