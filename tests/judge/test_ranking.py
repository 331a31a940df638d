"""How well a score ranks turns, against pairs counted one by one."""

import itertools
import math

import numpy as np
import pytest

from opd_jax.judge.labels import NO_LABEL, EnvLabels
from opd_jax.judge.ranking import auc, auc_figures
from opd_jax.judge.reliability import Reliability


def by_pairs(score: np.ndarray, good: np.ndarray, weight: np.ndarray) -> float:
    won = whole = 0.0
    for i, j in itertools.product(np.flatnonzero(good), np.flatnonzero(~good)):
        pair = float(weight[i]) * float(weight[j])
        won += pair * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
        whole += pair
    return won / whole


@pytest.mark.parametrize("values", [2, 5, 1000])
def test_it_is_the_share_of_pairs_in_order_with_ties_by_half(values: int) -> None:
    rng = np.random.default_rng(values)
    for n in (2, 7, 60):
        good = rng.permutation(np.arange(n) % 3 == 0)
        score = rng.integers(0, values, n).astype(np.float32) + good
        weight = rng.integers(0, 4, n).astype(float) + (np.arange(n) < 9)
        assert auc(score, good, weight) == pytest.approx(by_pairs(score, good, weight), abs=1e-12)
        # A weight of two is the same as being there twice; order and scale of scores do not matter.
        twice = np.repeat(np.arange(n), weight.astype(int))
        same = auc(score[twice], good[twice], np.ones(len(twice)))
        assert auc(score, good, weight) == pytest.approx(same, abs=1e-12)
        turned = rng.permutation(n)
        shuffled = auc(3 * score[turned] - 7, good[turned], weight[turned])
        assert auc(score, good, weight) == pytest.approx(shuffled, abs=1e-12)
        assert auc(-score, good, weight) == pytest.approx(1 - same, abs=1e-12)


def test_a_constant_has_half_and_the_truth_has_one() -> None:
    rng = np.random.default_rng(0)
    good, weight = rng.random(50) < 0.3, rng.random(50)
    assert auc(np.full(50, 0.1), good, weight) == pytest.approx(0.5, abs=1e-12)
    assert auc(good.astype(float), good, weight) == pytest.approx(1, abs=1e-12)
    assert auc(-good.astype(float), good, weight) == 0


def test_a_score_of_two_values_has_the_balanced_accuracy() -> None:
    rng = np.random.default_rng(1)
    good, said = rng.random(200) < 0.3, rng.random(200) < 0.6
    balanced = ((said & good).sum() / good.sum() + (~said & ~good).sum() / (~good).sum()) / 2
    assert auc(said.astype(float), good, np.ones(200)) == pytest.approx(balanced, abs=1e-12)


def test_without_both_kinds_there_is_nothing_to_tell() -> None:
    for good in (np.ones(3, bool), np.zeros(3, bool)):
        assert math.isnan(auc(np.arange(3.0), good, np.ones(3)))
    assert math.isnan(auc(np.arange(3.0), np.arange(3) == 1, np.array([1.0, 0.0, 1.0])))


def measured(
    rng: np.random.Generator, *, rows: int, turns: int, samples: int
) -> tuple[Reliability, EnvLabels]:
    """Own turns at half of the turns; a tenth of them is not known."""
    shape = rows, turns
    failed, asked = rng.random(shape) < 0.3, rng.random(shape) < 0.5
    oracle = np.where(failed, NO_LABEL, rng.integers(0, 3, shape))
    own = asked.sum(), samples
    rejected = rng.random(own) < 0.3
    said = np.where(rejected, NO_LABEL, rng.integers(0, 2, own))
    labels = EnvLabels(rng.random(own) < 0.9, rejected, said)
    return Reliability(asked, [], labels, {}), EnvLabels(np.ones(shape, bool), failed, oracle)


def test_figures_by_label_weigh_what_was_drawn_as_what_is_there() -> None:
    rng = np.random.default_rng(2)
    own, labels = measured(rng, rows=30, turns=6, samples=2)
    of_turn, of_sample = rng.normal(size=(own.asked.sum(), 1)), rng.integers(0, 3, (90, 2))
    of_sample = of_sample[rng.integers(0, 90, own.asked.sum())].astype(float)
    scores = {"turn": of_turn, "sample": of_sample, "constant": np.zeros_like(of_turn)}
    found = auc_figures(own, labels, scores)
    names = ("SKIP", "WEAK", "STRONG", "DET_FAIL")
    code = np.where(labels.failed, 3, labels.oracle)
    rows = []  # (label, episode, right, scores) of each own turn that is known
    for number, (row, turn) in enumerate(np.argwhere(own.asked)):
        for sample in range(2):
            if own.labels.played[number, sample]:
                good = (
                    not own.labels.failed[number, sample] and not own.labels.oracle[number, sample]
                )
                both = of_turn[number, 0], of_sample[number, sample]
                rows.append((code[row, turn], row, good, *both))
    label, _, good, *known = map(np.array, zip(*rows, strict=True))
    weight = np.ones(len(label))
    for at in range(4):
        weight[label == at] = (code == at).sum() / (label == at).sum()
    for score, x in zip(("turn", "sample"), known, strict=True):
        assert list(found[score]) == ["all", *names]
        assert found[score]["all"]["auc"] == pytest.approx(by_pairs(x, good, weight), abs=1e-12)
        for at, name in enumerate(names):
            of, these = found[score][name], label == at
            expected = by_pairs(x[these], good[these], np.ones(these.sum()))
            assert of["auc"] == pytest.approx(expected, abs=1e-12)
            assert of["n"] == these.sum()
            low, high = of["ci95"]
            assert 0 <= low < of["auc"] < high <= 1
    assert [of["auc"] for of in found["constant"].values()] == pytest.approx([0.5] * 5)
    assert [x for of in found["constant"].values() for x in of["ci95"]] == pytest.approx([0.5] * 10)


def test_episodes_that_are_alike_make_the_interval_wide() -> None:
    rng = np.random.default_rng(3)

    def width(rows: int, turns: int) -> float:
        """120 turns in so many episodes, whose turns are all alike."""
        good = np.repeat(np.arange(rows) % 2 == 0, turns)
        score = np.repeat(rng.normal(size=rows) + (np.arange(rows) % 2 == 0), turns)
        asked, one = np.ones((rows, turns), bool), (rows * turns, 1)
        own = EnvLabels(np.ones(one, bool), ~good[:, None], np.where(good[:, None], 0, NO_LABEL))
        there = EnvLabels(asked, ~asked, np.zeros_like(asked, int))
        figures = auc_figures(Reliability(asked, [], own, {}), there, {"x": score[:, None]})
        low, high = figures["x"]["all"]["ci95"]
        return high - low

    assert width(120, 1) < 0.6 * width(12, 10)
