"""Is a confidence of 0.9 right nine times in ten, and what does it buy to leave the unsure answers to someone else?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BINS = 15
COVERAGE_STEPS = 20
_Z_95 = 1.959964
Pair = tuple[float, bool]
"""(confidence 0..1, whether the answer was right)."""


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence.

    Args:
        index: of `BINS` equal widths, 0 from confidence 0.
        count: answers in it, at least one.
        confidence: their mean confidence, 0..1.
        accuracy: share of them that are right, 0..1.
    """

    index: int
    count: int
    confidence: float
    accuracy: float

    def as_dict(self) -> dict[str, Any]:
        """JSON form, four decimals."""
        return {
            "bin": self.index,
            "count": self.count,
            "confidence": round(self.confidence, 4),
            "accuracy": round(self.accuracy, 4),
        }


@dataclass(frozen=True)
class RiskPoint:
    """What a threshold buys.

    Args:
        coverage: share of all events whose answer reaches the threshold, 0..1.
        confidence: the threshold.
        wrong: share of wrong answers among those, 0..1.
    """

    coverage: float
    confidence: float
    wrong: float

    def as_dict(self) -> dict[str, float]:
        """JSON form, four decimals."""
        return {
            "coverage": round(self.coverage, 4),
            "confidence": round(self.confidence, 4),
            "wrong": round(self.wrong, 4),
        }


def bins(pairs: Sequence[Pair]) -> tuple[Bin, ...]:
    """Sort answers into bins of equal width; empty bins are left out.

    Args:
        pairs: confidence and hit of each answer, in any order.

    Returns:
        By rising confidence.

    Source:
        Guo et al., On Calibration of Modern Neural Networks, 2017, section 2.
    """
    sorted_in: dict[int, list[Pair]] = {}
    for confidence, hit in pairs:
        # 1.0 belongs to the last bin, which has both its ends.
        index = min(BINS - 1, max(0, int(confidence * BINS)))
        sorted_in.setdefault(index, []).append((confidence, hit))
    return tuple(
        # fsum: the order of the events must not show in the last digit.
        Bin(index, len(inside), math.fsum(c for c, _ in inside) / len(inside), sum(h for _, h in inside) / len(inside))
        for index, inside in sorted(sorted_in.items())
    )


def expected_calibration_error(pairs: Sequence[Pair]) -> float:
    """Mean distance between confidence and accuracy over the bins, weighted by their counts; 0 for no pairs.

    Source: Guo et al., 2017, equation 5.
    """
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins(pairs)) / max(1, len(pairs))


def risk_coverage(pairs: Sequence[Pair], events: int) -> tuple[RiskPoint, ...]:
    """The share of wrong answers as the threshold falls, at about every twentieth of the events.

    Answers of equal confidence are taken or left together, because no threshold tells them apart: a point may
    therefore cover more than its step, and steps that cover the same are one point.

    Args:
        pairs: confidence and hit of each answer, in any order.
        events: all events, those included that brought no answer.

    Returns:
        By rising coverage; the last point takes every answer.

    Source:
        Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, 2017, section 2.
    """
    # From surest to least sure.
    ranked = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    points: list[RiskPoint] = []
    taken = wrong = 0
    for step in range(1, COVERAGE_STEPS + 1):
        wanted = math.ceil(len(ranked) * step / COVERAGE_STEPS)
        before = taken
        while taken < len(ranked) and (taken < wanted or ranked[taken][0] == ranked[taken - 1][0]):
            wrong += not ranked[taken][1]
            taken += 1
        if taken > before:
            points.append(RiskPoint(taken / events, ranked[taken - 1][0], wrong / taken))
    return tuple(points)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted, both ends 0..1.

    Args:
        share: counted share, 0..1.
        count: of how many, at least 1.

    Source:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927: unlike the normal
        approximation it stays inside 0..1 and has a width when all answers are right.
    """
    spread = _Z_95 * math.sqrt(share * (1 - share) / count + _Z_95**2 / 4 / count / count)
    middle, scale = share + _Z_95**2 / (2 * count), 1 + _Z_95**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
