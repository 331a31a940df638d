"""95 % confidence intervals of rates and means."""

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate.

    With p = successes / n and z = 1.96:

        (p + z²/2n ± z · sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z·sqrt(p(1−p)/n) it stays inside [0, 1] and has a width at p = 0 and p = 1, where
    trained agents often are. With n = 0 it is [0, 1].

    Returns:
      (low, high), in [0, 1]; low is exactly 0 without successes, high exactly 1 without failures.

    Raises:
      ValueError: `successes` is outside [0, n].

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if successes == n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # imported late: it takes most of a second

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % Student t interval of a mean: m ± t(0.975, n−1) · s / sqrt(n).

    s is the sample standard deviation (n − 1). It suits few values, such as one score per seed.

    Returns:
      (low, high). Equal values give (m, m). A single value gives (nan, nan).

    Raises:
      ValueError: `values` is empty.

    Source: Student, The probable error of a mean, Biometrika 6 (1908), 1-25.
    """
    if len(values) == 0:
        raise ValueError("`values` must hold at least one number, got none")
    if len(values) == 1:
        return math.nan, math.nan
    from scipy.stats import sem, t

    # Not `t.interval`: it gives nan if all values are equal.
    mean, half = float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * sem(values))
    return mean - half, mean + half


def average_interval(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """95 % interval of the mean of independent estimates that each have an interval.

    With k estimates m_i in (l_i, h_i) and their mean m:

        (m − sqrt(Σ (m_i − l_i)²) / k, m + sqrt(Σ (h_i − m_i)²) / k)

    It keeps the asymmetry of its parts, so it has a width even if all of them are 0 or 1.

    Args:
      estimates: (m_i, l_i, h_i), at least one.

    Returns:
      (low, high). An end is nan if that end of any part is nan.

    Source: G. Y. Zou and A. Donner, Construction of confidence limits about effect measures: a
    general approach, Statistics in Medicine 27 (2008), 1693-1702.
    """
    mean, low, high = np.asarray(estimates, np.float64).T
    centre, k = float(mean.mean()), len(mean)
    below, above = np.linalg.norm(mean - low), np.linalg.norm(high - mean)
    return centre - float(below) / k, centre + float(above) / k
