"""Figures that people will decide by: accuracy, calibration error, temperatures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.contract.event import Event
from edge_agent.contract.task import GoldenExample, parse_task
from edge_agent.errors import EdgeError, RefusedError
from export.card.report import report_html_bytes
from export.proof.calibrate import MIN_ROWS, Trial, best_temperature, calibration_bytes
from export.proof.evaluate import Outcome, evaluate
from export.proof.greedy import Choice
from export.proof.measure import read_calibration
from export.proof.reliability import expected_calibration_error
from tests.export.conftest import TASK

SPEC = parse_task(TASK)
GOLD: dict[str, Any] = {"kind": "stop", "urgent": True, "rank": 3}


def rows(count: int) -> list[GoldenExample]:
    return [GoldenExample(event={"text": str(n)}, decision=GOLD) for n in range(count)]


def backend(answer: Callable[[int], dict[str, Any]], confidence: float = 0.9) -> Callable[[Event], Outcome]:
    def decide(event: Event) -> Outcome:
        decision = {**GOLD, **answer(int(str(event["text"])))}
        return Outcome(decision, dict.fromkeys(decision, confidence), guarded=False)

    return decide


def test_accuracy_counts_each_field_by_itself() -> None:
    quality = evaluate(backend(lambda n: {"kind": "slow"} if n < 2 else {"rank": 4} if n == 2 else {}), rows(10), SPEC)
    assert quality.accuracy == {"kind": 0.8, "urgent": 1.0, "rank": 0.9}
    assert quality.exact == 0.7


def test_event_that_brings_an_error_counts_as_wrong() -> None:
    def decide(event: Event) -> Outcome:
        if event["text"] == "0":
            raise RefusedError("event.too_long", "as on the device")
        return Outcome(GOLD, dict.fromkeys(GOLD, 1.0), guarded=False)

    quality = evaluate(decide, rows(4), SPEC)
    assert (quality.failed, quality.exact) == (1, 0.75)
    assert quality.accuracy["urgent"] == 0.75


def test_unsure_answers_are_apart() -> None:
    def decide(event: Event) -> Outcome:
        right = event["text"] != "0"
        sure = 0.9 if right else 0.2
        return Outcome(
            {**GOLD, "kind": "stop" if right else "slow"}, {**dict.fromkeys(GOLD, 0.9), "kind": sure}, guarded=False
        )

    quality = evaluate(decide, rows(4), SPEC)
    assert (quality.exact, quality.answered, quality.exact_when_answered) == (0.75, 0.75, 1.0)


def test_value_set_by_a_guard_says_nothing_about_confidence() -> None:
    def decide(event: Event) -> Outcome:
        return Outcome({**GOLD, "kind": "slow"}, dict.fromkeys(GOLD, 0.99), guarded=True)

    assert evaluate(decide, rows(4), SPEC).ece["kind"] == 0.0


@pytest.mark.parametrize(
    ("confidence", "hits", "error"), [(0.9, 9, 0.0), (0.9, 5, 0.4), (0.5, 10, 0.5), (1.0, 10, 0.0), (0.0, 10, 1.0)]
)
def test_calibration_error_is_the_gap_between_confidence_and_accuracy(
    confidence: float, hits: int, error: float
) -> None:
    pairs = [(confidence, n < hits) for n in range(10)]
    assert expected_calibration_error(pairs) == pytest.approx(error)


def trials(temperature: float, count: int = 1500) -> list[Trial]:
    """Choices among five tokens whose winner is right as often as softmax(logits / temperature) says."""
    rng = np.random.default_rng(0)
    made: list[Trial] = []
    for _ in range(count):
        logits = rng.normal(0, 4, 5).astype(np.float32)
        choice = Choice("kind", logits, int(logits.argmax()))
        made.append(((choice,), bool(rng.random() < choice.probability(temperature))))
    return made


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_fitted_temperature_is_the_one_that_made_the_data(temperature: float) -> None:
    assert best_temperature(trials(temperature)) == pytest.approx(temperature, rel=0.2)


def test_few_rows_keep_temperature_one() -> None:
    assert best_temperature(trials(2.5, MIN_ROWS - 1)) == 1.0


def test_probability_survives_huge_logits() -> None:
    choice = Choice("kind", np.array([1e30, -1e30, 0], np.float32), 0)
    assert choice.probability(0.3) == 1.0
    assert math.isclose(Choice("kind", np.zeros(4, np.float32), 2).probability(5.0), 0.25)


def test_calibration_file_is_read_back_as_the_device_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "sort"
    folder.mkdir(parents=True)
    assert read_calibration(tmp_path, SPEC).temperatures == {}
    (folder / "calibration.json").write_bytes(calibration_bytes({"kind": 1.3}))
    assert read_calibration(tmp_path, SPEC).temperatures == {"kind": 1.3, "urgent": 1.0, "rank": 1.0}
    (folder / "calibration.json").write_text(json.dumps({"format": 1, "temperature": [1.3]}))
    with pytest.raises(EdgeError) as caught:
        read_calibration(tmp_path, SPEC)
    assert caught.value.code == "task.calibration_invalid"


def test_markup_in_names_does_not_become_markup() -> None:
    report: dict[str, Any] = {
        "bundle": {"name": "<script>alert(1)</script>", "version": "1", "target": "cpu-x86_64"},
        "precision": "int4",
        "verification": "executed",
        "size_bytes": {"<b>": 1},
        "parity": {},
        "quality": {},
        "calibration": {},
        "checkpoint": {"architecture": "llama", "parameters": 1, "sha256": "00"},
        "tools": {},
    }
    page = report_html_bytes(report)
    assert b"<script>" not in page
    assert b"<b>" not in page
