"""How well a score tells turns at which the teacher is right from those at which it is not."""

from collections.abc import Mapping

import numpy as np

from opd_jax.judge.labels import EnvLabels
from opd_jax.judge.reliability import Reliability, by_outcome, right

_RESAMPLES = 1000


def auc(score: np.ndarray, good: np.ndarray, weight: np.ndarray) -> float:
    """The chance that a good one has a higher score than one that is not; a tie counts half.

        Σ_ij w_i w_j (1[s_i > s_j] + ½ 1[s_i = s_j]) / Σ_ij w_i w_j,  i good, j not

    A score that is constant, or knows nothing, has .5. One of two values has the balanced accuracy.

    Args:
      score: float [n].
      good: bool [n].
      weight: w, float [n], at least 0.

    Returns:
      0..1; nan without a weight on both sides.
    """
    order = np.argsort(score[~good], kind="stable")
    others = np.asarray(score[~good], np.float64)[order]
    total = np.concatenate([[0.0], np.cumsum(weight[~good][order], dtype=np.float64)])
    mine, own = np.asarray(score[good], np.float64), np.asarray(weight[good], np.float64)
    below, upto = (total[np.searchsorted(others, mine, side)] for side in ("left", "right"))
    whole = own.sum() * total[-1]
    return float((own * (below + upto)).sum() / 2 / whole) if whole else float("nan")


def auc_figures(
    own: Reliability, labels: EnvLabels, scores: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict[str, object]]]:
    """`auc` of scores against what became of the teacher's own turns.

    Turns may be drawn label by label: among all, those of a label weigh as much as it has turns.

    Args:
      own: the teacher's turns, N of them; the target is whether each is right.
      labels: of the student's turns, [B, K].
      scores: name to float [N, samples] or [N, 1].

    Returns:
      Score's name to the label of the student's turn, or "all", to `auc`, `n` (own turns) and
      `ci95`, a bootstrap over episodes. None where all of them are right, or none is.
    """
    known, (episode, _) = own.labels.played, np.nonzero(own.asked)

    def flat(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, known.shape)[known]

    good, episode, weight = right(own.labels)[known], flat(episode[:, None]), np.ones(known.sum())
    of_label = {"all": np.ones_like(good)}
    for name, there in by_outcome(labels).items():
        if (of := flat(there[own.asked][:, None])).any():
            of_label[name] = of
            weight[of] = there.sum() / of.sum()
    return {
        score: {
            name: _with_interval(flat(x)[of], good[of], weight[of], episode[of])
            for name, of in of_label.items()
        }
        for score, x in scores.items()
    }


def _with_interval(
    score: np.ndarray, good: np.ndarray, weight: np.ndarray, episode: np.ndarray
) -> dict[str, object]:
    found = auc(score, good, weight)
    if np.isnan(found):
        return {"auc": None, "ci95": None, "n": len(good)}
    episodes, number = np.unique(episode, return_inverse=True)
    shares = np.full(len(episodes), 1 / len(episodes))
    drawn = np.random.default_rng(0).multinomial(len(episodes), shares, size=_RESAMPLES)
    resampled = [auc(score, good, weight * times[number]) for times in drawn]
    interval = [float(x) for x in np.nanquantile(resampled, [0.025, 0.975])]
    return {"auc": found, "ci95": interval, "n": len(good)}
