"""What a count of wrong answers says about the share behind it, exactly: no approximation, none needed."""

from __future__ import annotations

import math
from collections.abc import Callable

_BISECTIONS = 60
_NEGLIGIBLE = 1e-17


def at_most(wrong: int, count: int, share: float) -> float:
    """Probability of at most ``wrong`` wrong answers of ``count``, when each is wrong with probability ``share``.

    Args:
        wrong: 0..count.
        count: answers, at least 0.
        share: 0..1.
    """
    if wrong >= count or share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    # Away from the middle, where terms only shrink: a sum of a few of them, whatever the count.
    if wrong <= count * share:
        return _tail(wrong, count, share)
    return 1 - _tail(count - wrong - 1, count, 1 - share)


def _tail(last: int, count: int, share: float) -> float:
    """Probability of at most ``last`` of ``count``, where ``last`` lies below the middle."""
    # A logarithm to begin with: the coefficients of a few thousand answers overflow a double.
    coefficient = math.lgamma(count + 1) - math.lgamma(last + 1) - math.lgamma(count - last + 1)
    term = math.exp(coefficient + last * math.log(share) + (count - last) * math.log1p(-share))
    total, down = 0.0, (1 - share) / share
    for taken in range(last, -1, -1):
        total += term
        term *= taken / (count - taken + 1) * down
        if term < total * _NEGLIGIBLE:
            break
    return min(1.0, total)


def upper_bound(wrong: int, count: int, certainty: float) -> float:
    """The largest share of wrong answers that the count does not rule out with this certainty; 1 of nothing.

    Source:
        Clopper and Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, 1934.
    """
    if wrong >= count:
        return 1.0
    return _falling_through(lambda share: at_most(wrong, count, share), 1 - certainty)


def lower_bound(wrong: int, count: int, certainty: float) -> float:
    """The smallest such share; 0 of nothing. Source: as `upper_bound`."""
    return 1 - upper_bound(count - wrong, count, certainty) if count else 0.0


def interval(wrong: int, count: int, certainty: float = 0.95) -> tuple[float, float]:
    """Both ends of a share's exact interval, 0..1: each end is missed with half of what is left of the certainty."""
    each = 1 - (1 - certainty) / 2
    return lower_bound(wrong, count, each), upper_bound(wrong, count, each)


def least_count(share: float, certainty: float) -> int:
    """Answers that must all be right before a share of wrong ones can be ruled out."""
    return math.ceil(math.log(1 - certainty) / math.log1p(-share))


def _falling_through(function: Callable[[float], float], level: float) -> float:
    """Where a function that falls over 0..1 passes a level, rounded up."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > level else (low, middle)
    return high
