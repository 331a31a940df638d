"""How far a judge's verdicts agree with the labels of an environment that knows the truth.

An environment's oracle labels a turn SKIP, WEAK or STRONG from hidden knowledge, such as the exact
distance to the goal. The judge never sees those labels; here the two are compared.
"""

from collections.abc import Sequence

import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.judge.answer import LABELS
from opd_jax.judge.verdicts import Judgement
from opd_jax.losses import Verdict

_RESAMPLES = 1000


def confusion(judgement: Judgement, conversations: Sequence[Conversation]) -> np.ndarray:
    """Counts of turns by the oracle's label and the judge's, over turns that have both.

    Args:
      judgement: `verdict` and `asked`, [B, K] each.
      conversations: the B episodes judged, of at most K turns.

    Returns:
      int64 [B, 3, 3]: conversation, oracle's label, judge's label, in the order of `LABELS`.
    """
    counts = np.zeros((len(conversations), len(LABELS), len(LABELS)), np.int64)
    for row, conversation in enumerate(conversations):
        for index, turn in enumerate(conversation.turns):
            if turn.oracle and judgement.asked[row, index]:
                counts[row, Verdict[turn.oracle], judgement.verdict[row, index]] += 1
    return counts


def precision(counts: np.ndarray) -> tuple[int, int]:
    """(part, whole): of the turns that the judge wants corrected, those that are not fine.

    The judge wants WEAK and STRONG turns corrected; what the oracle does not call SKIP is not fine.

    Args:
      counts: int [3, 3], oracle's label by judge's.
    """
    return counts[1:, 1:].sum(), counts[:, 1:].sum()


def recall(counts: np.ndarray) -> tuple[int, int]:
    """(part, whole): of the turns that are not fine, those that the judge wants corrected."""
    return counts[1:, 1:].sum(), counts[1:].sum()


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean, over the oracle's labels that occur, of the share of turns that the judge labels so.

    A judge that always gives the same answer reaches one over the number of labels that occur.

    Args:
      counts: int [..., 3, 3].

    Returns:
      float [...]; nan where nothing was counted.
    """
    of_label = counts.sum(axis=-1)
    right = np.diagonal(counts, axis1=-2, axis2=-1) / np.maximum(of_label, 1)
    occurring = (of_label > 0).sum(axis=-1)
    return np.where(occurring, right.sum(axis=-1) / np.maximum(occurring, 1), np.nan)


def figures(counts: np.ndarray) -> dict[str, object]:
    """The judge's figures over a panel of episodes.

    Args:
      counts: as from `confusion`.

    Returns:
      `balanced_accuracy` with `ci95`, a bootstrap over episodes, since the turns of one episode
      are alike; `always_skip`, the balanced accuracy of a judge that finds everything fine;
      `precision`, `recall` (None where there is nothing to divide by); `n`, turns.

    Raises:
      ValueError: nothing was counted.
    """
    if not counts.any():
        raise ValueError(
            "no turn has both a verdict and a label of the environment's; agreement can be "
            "measured only where the environment has an oracle"
        )
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
