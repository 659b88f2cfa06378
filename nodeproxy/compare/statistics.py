"""Owns the mathematics of balance: chi-square against equal shares, and the chance of such a value where shares are equal.

The chance is the regularised upper incomplete gamma function Q(degrees/2, statistic/2), by its series where that converges
fast (x < a + 1) and by its continued fraction elsewhere; Abramowitz and Stegun, 6.5.29, 6.5.31 and 26.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_TERMS = 100_000
_PRECISION = 1e-15
_TINY = 1e-300


def chi_square(counts: Sequence[int]) -> float:
    """Pearson's statistic of counts against the same count everywhere; 0.0 where nothing was counted."""
    mean = sum(counts) / len(counts) if counts else 0.0
    return sum((count - mean) ** 2 for count in counts) / mean if mean else 0.0


def p_value(statistic: float, degrees: int) -> float:
    """The chance that chi-square with so many degrees of freedom is at least `statistic`; 1.0 without any degree."""
    return 1.0 if degrees < 1 else upper_gamma(degrees / 2, statistic / 2)


def upper_gamma(a: float, x: float) -> float:
    """Q(a, x), regularised, for a > 0. Raises ValueError where it is not defined."""
    if a <= 0 or x < 0:
        raise ValueError(f"Q({a}, {x}) is not defined")
    if x == 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        return max(0.0, 1.0 - scale * _series(a, x))
    return scale * _fraction(a, x)


def _series(a: float, x: float) -> float:
    """Sum of x^n / (a (a+1) … (a+n))."""
    term = total = 1.0 / a
    for n in range(1, _TERMS):
        term *= x / (a + n)
        total += term
        if term < total * _PRECISION:
            break
    return total


def _fraction(a: float, x: float) -> float:
    """1/(x+1-a- 1(1-a)/(x+3-a- 2(2-a)/(x+5-a- …))), from the front (Lentz)."""
    bottom = x + 1 - a
    ratio_above = 1 / _TINY
    ratio_below = 1 / bottom
    value = ratio_below
    for n in range(1, _TERMS):
        numerator = -n * (n - a)
        bottom += 2
        ratio_below = 1 / (numerator * ratio_below + bottom or _TINY)
        ratio_above = bottom + numerator / ratio_above or _TINY
        change = ratio_below * ratio_above
        value *= change
        if abs(change - 1) < _PRECISION:
            break
    return value


def shows_all(choices: int, missed: float) -> int:
    """How many draws show every one of so many equally likely choices, but for a chance of `missed`; 1 for a single one."""
    return 1 if choices < 2 else math.ceil(math.log(choices / missed) / -math.log(1 - 1 / choices))
