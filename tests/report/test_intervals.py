"""Intervals against their formulas by hand, and at their ends."""

import math

import numpy as np
import pytest

from opd_jax.report.intervals import average_interval, mean_interval, wilson_interval

Z = 1.959963984540054  # 0.975 quantile of the standard normal distribution


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (1, 3), (37, 100), (399, 400)])
def test_wilson_interval_follows_its_formula(successes: int, n: int) -> None:
    p = successes / n
    centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    expected = np.array([centre - half, centre + half]) / (1 + Z**2 / n)
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=1e-12)


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for n in (1, 7, 134):  # exactly, without a rounding error
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0
    for successes, n in [(-1, 3), (4, 3), (1, 0)]:
        with pytest.raises(ValueError, match="must"):
            wilson_interval(successes, n)


def test_mean_interval_follows_its_formula() -> None:
    # The quantile of Student's t has a closed form for one and for two degrees of freedom.
    one, two = math.tan(0.475 * math.pi), 0.95 * math.sqrt(2 / (1 - 0.95**2))
    for values, quantile in [([1.0, 2.5], one), ([0.5, 0.75, 0.9], two)]:
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        half = quantile * math.sqrt(variance / len(values))
        # Until 1.16 scipy's quantile is 2.5e-11 from the closed form.
        assert mean_interval(values) == pytest.approx((mean - half, mean + half), rel=1e-10)


def test_mean_interval_of_too_few_or_equal_values() -> None:
    assert mean_interval([0.75] * 4) == (0.75, 0.75)
    assert all(math.isnan(bound) for bound in mean_interval([0.5]))
    with pytest.raises(ValueError, match="`values`"):
        mean_interval([])


def test_average_interval_of_normal_estimates_is_that_of_their_mean() -> None:
    rng = np.random.default_rng(2)
    means, errors = rng.normal(size=7), rng.uniform(0.1, 2, size=7)
    estimates = [(m, m - Z * e, m + Z * e) for m, e in zip(means, errors, strict=True)]
    half = Z * np.sqrt(np.mean(errors**2) / 7)
    expected = (means.mean() - half, means.mean() + half)
    assert average_interval(estimates) == pytest.approx(expected)


def test_average_interval_is_as_lopsided_as_its_parts() -> None:
    assert average_interval([(0.3, 0.1, 0.9)]) == pytest.approx((0.1, 0.9))
    assert average_interval([(0.0, 0.0, 0.2)] * 4) == pytest.approx((0.0, 0.1))
