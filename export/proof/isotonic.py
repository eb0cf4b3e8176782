"""Where one temperature cannot straighten a field's confidences: a rising line through what was counted.

Confidence only: the line never falls, so the likeliest value stays the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edge_agent.runtime.calibration import Knots
from export.proof.reliability import Pair

MIN_EVENTS = 200
"""Fewer say too little about the shape of a line; one temperature is enough to learn from them."""
FOLDS = 5
_DECIMALS = 6
_FLOOR = 1e-6


def fit_knots(pairs: Sequence[Pair]) -> Knots | None:
    """Pool answers of neighbouring confidence until the share of right ones rises, and join the pools' middles.

    Args:
        pairs: confidence after temperature and hit, in any order.

    Returns:
        The line; None where it would be level, which says nothing.

    Source:
        Ayer et al., An Empirical Distribution Function for Sampling with Incomplete Information, 1955 (pool adjacent
        violators); Zadrozny and Elkan, Transforming Classifier Scores into Accurate Multiclass Probability Estimates,
        2002; Oron and Flournoy, Centered Isotonic Regression, 2017 (a pool stands at its mean).
    """
    raw: list[float] = []
    right: list[float] = []
    for count, confidence, hits in _pools(pairs):
        middle = round(confidence / count, _DECIMALS)
        # Half an answer either way: nothing that was counted makes a share of 0 or 1 certain.
        level = round(max((hits + 0.5) / (count + 1), right[-1] if right else 0.0), _DECIMALS)
        if raw and middle <= raw[-1]:
            right[-1] = level
        else:
            raw.append(middle)
            right.append(level)
    return Knots(raw=tuple(raw), right=tuple(right)) if len(raw) > 1 else None


def helpful_knots(pairs: Sequence[Pair]) -> Knots | None:
    """The line, where it serves answers better that it was not fitted on; else None.

    Judged by log loss on every fifth part in turn, against the confidence as it was: the mean gain must exceed its own
    standard error, because a line has many more ways to fit chance than a temperature.

    Args:
        pairs: confidence after temperature and hit, in an order that means nothing.
    """
    if len(pairs) < MIN_EVENTS:
        return None
    gains: list[float] = []
    for fold in range(FOLDS):
        knots = fit_knots([pair for index, pair in enumerate(pairs) if index % FOLDS != fold])
        read: Callable[[float], float] = knots.read if knots else float
        gains += [log_loss(pair, float) - log_loss(pair, read) for pair in pairs[fold::FOLDS]]
    mean = math.fsum(gains) / len(gains)
    spread = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
    return fit_knots(pairs) if mean > spread else None


def log_loss(pair: Pair, read: Callable[[float], float]) -> float:
    """Nats lost on one answer's "is this right?".

    Args:
        pair: confidence and hit.
        read: turns the confidence into a probability.
    """
    confidence = min(1 - _FLOOR, max(_FLOOR, read(pair[0])))
    return -math.log(confidence if pair[1] else 1 - confidence)


def _pools(pairs: Sequence[Pair]) -> list[tuple[int, float, int]]:
    """(answers, sum of their confidences, right ones), shares of right strictly rising."""
    pools: list[tuple[int, float, int]] = []
    for confidence, count, hits in _distinct(pairs):
        pool = (count, confidence * count, hits)
        while pools and pools[-1][2] * pool[0] >= pool[2] * pools[-1][0]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return pools


def _distinct(pairs: Sequence[Pair]) -> list[tuple[float, int, int]]:
    """(confidence, answers, right ones) by rising confidence: equal confidences are one point."""
    counts: dict[float, tuple[int, int]] = {}
    for confidence, hit in pairs:
        count, hits = counts.get(confidence, (0, 0))
        counts[confidence] = (count + 1, hits + hit)
    return [(confidence, *counts[confidence]) for confidence in sorted(counts)]
