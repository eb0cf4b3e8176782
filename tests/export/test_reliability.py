"""Bins, risk and intervals: how right a bundle was at each confidence."""

from __future__ import annotations

from typing import Any

import pytest

from edge_agent.contract.event import Event
from edge_agent.contract.task import GoldenExample, parse_task
from edge_agent.errors import RefusedError
from export.proof.evaluate import Outcome, evaluate, without_curves
from export.proof.reliability import bins, expected_calibration_error, risk_coverage, wilson_interval
from tests.export.conftest import TASK


def test_bins_hold_every_answer_once() -> None:
    pairs = [(n / 200, n % 3 == 0) for n in range(201)]
    found = bins(pairs)
    assert sum(b.count for b in found) == len(pairs)
    assert all(b.index / 15 <= b.confidence <= (b.index + 1) / 15 for b in found)
    assert sum(b.accuracy * b.count for b in found) == pytest.approx(sum(hit for _, hit in pairs))


def test_order_of_events_does_not_change_the_bins() -> None:
    pairs = [(n * 0.618 % 1, n % 2 == 0) for n in range(500)]
    assert bins(pairs) == bins(pairs[::-1])
    assert risk_coverage(pairs, 500) == risk_coverage(pairs[::-1], 500)


def test_calibration_error_is_that_of_the_bins() -> None:
    pairs = [(0.95, True)] * 6 + [(0.95, False)] * 2 + [(0.3, False)] * 2
    assert expected_calibration_error(pairs) == pytest.approx((8 * 0.2 + 2 * 0.3) / 10)
    assert expected_calibration_error([]) == 0.0


def test_risk_falls_to_nothing_when_the_sure_answers_are_right() -> None:
    points = risk_coverage([(n / 100, n >= 40) for n in range(100)], 100)
    assert [p.wrong for p in points if p.coverage <= 0.6] == [0.0] * 12
    assert points[-1].coverage == 1.0
    assert points[-1].wrong == pytest.approx(0.4)
    assert [p.confidence for p in points] == sorted((p.confidence for p in points), reverse=True)


def test_answers_that_no_threshold_tells_apart_are_taken_together() -> None:
    points = risk_coverage([(0.9, True)] * 50 + [(0.9, False)] * 50, 100)
    assert [(p.coverage, p.confidence, p.wrong) for p in points] == [(1.0, 0.9, 0.5)]


def test_events_without_an_answer_are_never_covered() -> None:
    assert risk_coverage([(0.9, True)], 4)[-1].coverage == 0.25
    assert risk_coverage([], 4) == ()


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 20, 5000])
def test_interval_holds_its_share_and_stays_inside(share: float, count: int) -> None:
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert high > low


def test_interval_is_the_published_one() -> None:
    assert wilson_interval(0.1, 100) == pytest.approx((0.0552, 0.1744), abs=5e-5)


def rows(count: int) -> list[GoldenExample]:
    return [
        GoldenExample(event={"text": str(n)}, decision={"kind": "stop", "urgent": True, "rank": 3})
        for n in range(count)
    ]


@pytest.fixture
def measured() -> dict[str, Any]:
    def decide(event: Event) -> Outcome:
        number = int(str(event["text"]))
        if number == 9:
            raise RefusedError("event.too_long", "as on the device")
        decision = {"kind": "slow" if number == 0 else "stop", "urgent": True, "rank": 3}
        sure = 0.3 if number == 0 else 0.9 + number / 100
        return Outcome(decision, {"kind": sure, "urgent": 0.99, "rank": 0.95}, guarded=number == 1)

    return evaluate(decide, rows(10), parse_task(TASK)).as_dict()


def test_evaluation_keeps_the_bins_of_its_calibration_error(measured: dict[str, Any]) -> None:
    found = measured["reliability"]["kind"]
    assert sum(b["count"] for b in found) == 8  # ten, less the guarded and the failed one
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in found) / 8
    assert error == pytest.approx(measured["ece"]["kind"], abs=1e-4)


def test_evaluation_ranks_whole_decisions_by_their_least_sure_field(measured: dict[str, Any]) -> None:
    curve = measured["risk_coverage"]["decision"]
    assert curve[-1] == {"coverage": 0.9, "confidence": 0.3, "wrong": round(1 / 9, 4)}
    assert curve[-2]["wrong"] == 0.0
    assert max(point["confidence"] for point in curve) <= 0.95  # rank is never surer than that


def test_manifest_is_spared_the_curves(measured: dict[str, Any]) -> None:
    short = without_curves({"sort": {"int4": measured}})["sort"]["int4"]
    assert set(measured) - set(short) == {"reliability", "risk_coverage"}
    assert short["accuracy"] == measured["accuracy"]
