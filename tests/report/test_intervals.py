"""Intervals against scipy, and at their ends."""

import math

import numpy as np
import pytest

from opd_jax.report.intervals import average_interval, mean_interval, wilson_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (1, 3), (37, 100), (399, 400)])
def test_wilson_interval_equals_scipy(successes, n):
    from scipy.stats import binomtest

    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_at_the_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    for successes, n in [(-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="`successes`"):
            wilson_interval(successes, n)


def test_mean_interval_equals_scipy():
    from scipy import stats

    for values in ([0.5, 0.75, 0.9], np.random.default_rng(1).normal(size=40)):
        expected = stats.t.interval(
            0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
        )
        assert mean_interval(values) == pytest.approx(expected, rel=1e-12)


def test_mean_interval_of_too_few_values():
    assert all(math.isnan(bound) for bound in mean_interval([0.5]))
    with pytest.raises(ValueError, match="`values`"):
        mean_interval([])


def test_average_interval_of_normal_estimates_is_that_of_their_mean():
    rng = np.random.default_rng(2)
    means, errors = rng.normal(size=7), rng.uniform(0.1, 2, size=7)
    estimates = [(m, m - 1.96 * e, m + 1.96 * e) for m, e in zip(means, errors, strict=True)]
    half = 1.96 * np.sqrt(np.mean(errors**2) / 7)
    expected = (means.mean() - half, means.mean() + half)
    assert average_interval(estimates) == pytest.approx(expected)


def test_average_interval_is_as_lopsided_as_its_parts():
    assert average_interval([(0.3, 0.1, 0.9)]) == pytest.approx((0.1, 0.9))
    none = (0.0, *wilson_interval(0, 25))
    low, high = average_interval([none] * 4)
    assert low == 0.0
    assert high == pytest.approx(none[2] / 2)
