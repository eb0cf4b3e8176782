"""The smallest confidence from which on a field's values keep an error target, certain in spite of few events.

Two halves of the labelled events, drawn apart by lot. The first (on which temperatures were fitted as well) lays out a
sequence of floors: from the one that looks safest on it down to zero. The second tests them in that order and stops at
the first that fails; the last that passed is chosen. As the sequence does not depend on the second half, each test may
use the whole certainty: a floor that breaks the target is chosen only if the first such floor of the sequence passes
its exact binomial test, which happens with probability 1 - certainty at most.

Source:
    Angelopoulos, Bates, Candès, Jordan, Lei, Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
    Control, 2021 (fixed sequence testing); Bauer, Multiple Testing in Clinical Trials, 1991 (the same, earlier);
    Laufer-Goldshtein, Fisch, Barzilay, Jaakkola, Efficiently Controlling Multiple Risks with Pareto Testing, 2023 (a
    sequence that was laid out on other data).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

from edge_agent.contract.thresholds import ChosenFloor, ErrorTarget
from edge_agent.errors import PermanentError
from export.proof.binomial import at_most, least_count
from export.proof.reliability import Pair

DECIMALS = 6
"""Of a floor: confidences crowd below 1, where a floor of 0.99 and one of 0.999 are two different promises."""
_MOST_EVENTS = 10_000_000

Row = TypeVar("Row")


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Divide and shuffle rows by lot, the same lot on every machine; the first half is the larger where they are odd.

    By number and not by content: two equal events are two draws of what the plant sends, wherever they fall.
    """
    drawn = sorted(range(len(rows)), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    cut = (len(rows) + 1) // 2
    return [rows[index] for index in drawn[:cut]], [rows[index] for index in drawn[cut:]]


def never(target: ErrorTarget, events: int = 0, needed_events: int | None = None) -> ChosenFloor:
    """No floor: the field is unsure whatever the model says."""
    return ChosenFloor(
        max_wrong=target.max_wrong,
        certainty=target.certainty,
        floor=None,
        events=events,
        passed=0,
        wrong=0,
        needed_events=needed_events,
    )


def choose_floor(
    scouted: Sequence[Pair], tested: Sequence[Pair], target: ErrorTarget, events: tuple[int, int]
) -> ChosenFloor:
    """Choose one field's floor.

    Args:
        scouted: confidence and hit of the first half's answers, in any order.
        tested: those of the second half.
        target: what to keep to.
        events: labelled events of the first and of the second half, those included that brought no answer.

    Returns:
        The floor with its counts on the second half; without a floor where none keeps the target, and then with the
        number of labelled events that would do if further ones are as those at hand (None: no number would).

    Raises:
        PermanentError: ``worker.bad_logits`` for a confidence that is not in 0..1.
    """
    for confidence, _ in (*scouted, *tested):
        if not 0 <= confidence <= 1:
            raise PermanentError("worker.bad_logits", f"a confidence of {confidence} is none")
    found = None
    sequence = _sequence(scouted, target)
    counts = _passing(tested, sequence)
    for floor, (passed, wrong) in zip(sequence, counts, strict=True):
        if at_most(wrong, passed, target.max_wrong) > 1 - target.certainty:
            break
        found = ChosenFloor(
            max_wrong=target.max_wrong,
            certainty=target.certainty,
            floor=floor,
            events=events[1],
            passed=passed,
            wrong=wrong,
        )
    return found or never(target, events[1], _needed(*counts[0], target, events))


def scout(scouted: Sequence[Pair], target: ErrorTarget) -> tuple[int, float]:
    """How promising a way to measure sureness is, as far as the first half can tell; more is better.

    Args:
        scouted: sureness and hit of the first half's answers.
        target: what to keep to.

    Returns:
        Answers that pass the smallest floor which the first half alone would choose, and (which decides where that
        is none) how clearly it speaks for the target.
    """
    counts = _passing(scouted, _sequence(scouted, target))
    doubts = [at_most(wrong, passed, target.max_wrong) for passed, wrong in counts]
    passing = 0
    for (passed, _), doubt in zip(counts, doubts, strict=True):
        if doubt > 1 - target.certainty:
            break
        passing = passed
    return passing, -doubts[0]


def _sequence(scouted: Sequence[Pair], target: ErrorTarget) -> list[float]:
    """Floors in the order of their tests.

    It begins where the first half speaks most clearly for the target: a stricter floor passes too few answers to
    prove anything, and one failed test ends the search.
    """
    scale = 10**DECIMALS
    # Rounded down, so that the answer that gave the floor passes it.
    floors = sorted({math.floor(confidence * scale) / scale for confidence, _ in scouted} | {0.0}, reverse=True)
    doubts = [at_most(wrong, passed, target.max_wrong) for passed, wrong in _passing(scouted, floors)]
    return floors[doubts.index(min(doubts)) :]


def _passing(pairs: Sequence[Pair], floors: Sequence[float]) -> list[tuple[int, int]]:
    """Answers that reach each of the falling floors, and the wrong ones among them."""
    ranked = sorted(pairs, reverse=True)
    counts: list[tuple[int, int]] = []
    passed = wrong = 0
    for floor in floors:
        while passed < len(ranked) and ranked[passed][0] >= floor:
            wrong += not ranked[passed][1]
            passed += 1
        counts.append((passed, wrong))
    return counts


def _needed(passed: int, wrong: int, target: ErrorTarget, events: tuple[int, int]) -> int | None:
    if passed and wrong / passed >= target.max_wrong:
        return None
    rate = wrong / passed if passed else 0.0
    answers = max(passed, least_count(target.max_wrong, target.certainty))
    while at_most(math.ceil(rate * answers), answers, target.max_wrong) > 1 - target.certainty:
        answers = math.ceil(answers * 1.02)
        if answers > _MOST_EVENTS:
            return None
    share_passing = passed / events[1] if passed else 1.0
    return math.ceil(answers / share_passing) * 2
