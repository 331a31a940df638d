"""How far a measured rate or mean can be trusted: 95 % confidence intervals."""

import math
from collections.abc import Sequence

import numpy as np

# 0.975 quantile of the standard normal distribution: two-sided 95 %.
_Z_95 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a success rate.

    With p = successes / n and z = 1.96:

        (p + z²/2n ± z · sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z·sqrt(p(1−p)/n) it stays inside [0, 1] and is not empty at p = 0 or p = 1, where
    trained agents often are.

    Args:
      successes: number of successes, in [0, n].
      n: number of trials; with 0 nothing is known and the interval is [0, 1].

    Returns:
      (low, high), in [0, 1].

    Raises:
      ValueError: `successes` is outside [0, n].

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"`successes` must be in [0, n] = [0, {n}], got {successes}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z_95**2
    centre = p + z2 / (2 * n)
    half = _Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding would leave it some 1e-17 away.
    low = 0.0 if successes == 0 else (centre - half) / (1 + z2 / n)
    high = 1.0 if successes == n else (centre + half) / (1 + z2 / n)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % Student t interval of a mean: m ± t(0.975, n−1) · s / sqrt(n).

    It suits few values, such as one score a seed; s is the sample standard deviation (n − 1).

    Args:
      values: at least one number.

    Returns:
      (low, high); (nan, nan) for a single value, which says nothing about spread.

    Raises:
      ValueError: `values` is empty.

    Source: Student, The probable error of a mean, Biometrika 6 (1908), 1-25.
    """
    if len(values) == 0:
        raise ValueError("`values` must hold at least one number, got none")
    if len(values) == 1:
        return math.nan, math.nan
    from scipy.special import stdtrit  # jax depends on scipy

    numbers = np.asarray(values, np.float64)
    quantile = float(stdtrit(len(numbers) - 1, 0.975))
    half = quantile * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return float(numbers.mean()) - half, float(numbers.mean()) + half


def average_interval(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """95 % interval of the mean of independent estimates that have an interval each.

    With k estimates m_i in (l_i, h_i) and their mean m:

        (m − sqrt(Σ (m_i − l_i)²) / k, m + sqrt(Σ (h_i − m_i)²) / k)

    It keeps the lopsidedness of its parts, and so is not empty where all of them are 0 or 1.

    Args:
      estimates: (m_i, l_i, h_i), at least one.

    Returns:
      (low, high); nan where that end of a part is.

    Source: G. Y. Zou and A. Donner, Construction of confidence limits about effect measures: a
    general approach, Statistics in Medicine 27 (2008), 1693-1702.
    """
    mean, low, high = np.asarray(estimates, np.float64).T
    centre, k = float(mean.mean()), len(mean)
    below, above = np.linalg.norm(mean - low), np.linalg.norm(high - mean)
    return centre - float(below) / k, centre + float(above) / k
