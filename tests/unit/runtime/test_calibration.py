"""Calibration files of yesterday, of tomorrow, and of no use."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.task import TaskSpec, parse_task
from edge_agent.errors import PermanentError
from edge_agent.runtime.calibration import Calibration, Knots, load_calibration
from tests.unit.contract.test_task import TASK

PLAIN = parse_task(TASK)
ASKING = parse_task(TASK.replace("{severity: 0.7}", "{severity: {max_wrong: 0.01}}"))
FLOOR = {"max_wrong": 0.01, "certainty": 0.95, "floor": 0.9, "events": 500, "passed": 400, "wrong": 0}
LINE = {"raw": [0.2, 0.8], "right": [0.1, 0.7]}


def load(tmp_path: Path, content: dict[str, Any], task: TaskSpec = PLAIN) -> Calibration:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    return load_calibration(path, task)


def test_a_file_from_before_there_were_floors_still_loads(tmp_path: Path) -> None:
    found = load(tmp_path, {"format": 1, "temperature": {"severity": 1.3}})
    assert found.temperatures == {"severity": 1.3, "stop": 1.0, "minutes": 1.0}
    assert found.floors.escalate == {"severity": 0.7}
    assert found.published({"severity": 0.4}) == {"severity": 0.4}


def test_a_file_with_more_than_is_known_today_still_loads(tmp_path: Path) -> None:
    later = {"format": 1, "floors": {"severity": {**FLOOR, "seen_by": "tomorrow"}}, "weather": "fine"}
    assert load(tmp_path, later, ASKING).floors.escalate == {"severity": 0.9}


def test_a_bundle_without_calibration_cannot_serve_a_task_with_an_error_target() -> None:
    assert load_calibration(None, PLAIN).floors.escalate == {"severity": 0.7}
    with pytest.raises(PermanentError) as caught:
        load_calibration(None, ASKING)
    assert caught.value.code == "task.calibration_invalid"


def test_no_floor_is_spelled_out_as_null_and_means_never_sure(tmp_path: Path) -> None:
    found = load(tmp_path, {"format": 1, "floors": {"severity": {**FLOOR, "floor": None, "passed": 0}}}, ASKING)
    assert found.floors.unsure({"severity": 1.0}) == ("severity",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"format": 1}, "no floor"),
        ({"format": 1, "floors": {"severity": {**FLOOR, "max_wrong": 0.05}}}, "was chosen for"),
        ({"format": 1, "floors": {"severity": FLOOR, "nonsense": FLOOR}}, "unknown fields: nonsense"),
        (
            {"format": 1, "floors": {"severity": {**FLOOR, "over": ["nonsense", "severity"]}}},
            "unknown fields: nonsense",
        ),
        ({"format": 1, "floors": {"severity": {k: v for k, v in FLOOR.items() if k != "floor"}}}, "floor"),
        ({"format": 1, "floors": {"severity": {**FLOOR, "floor": float("nan")}}}, "floor"),
        ({"format": 1, "floors": {"severity": 0.9}}, "floors"),
        ({"format": 2, "knots": {"nonsense": LINE}, "floors": {"severity": FLOOR}}, "unknown fields: nonsense"),
        ({"format": 1, "knots": {"severity": LINE}, "floors": {"severity": FLOOR}}, "format 2"),
        ({"format": 2, "floors": {"severity": FLOOR}}, "format 2"),
        ({"format": 3, "floors": {"severity": FLOOR}}, "format"),
    ],
)
def test_a_calibration_that_does_not_fit_its_task_is_refused(
    tmp_path: Path, content: dict[str, Any], named: str
) -> None:
    with pytest.raises(PermanentError, match=named) as caught:
        load(tmp_path, content, ASKING)
    assert caught.value.code == "task.calibration_invalid"


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content, "latin-1")
    with pytest.raises(PermanentError) as caught:
        load_calibration(path, PLAIN)
    assert caught.value.code == "task.calibration_invalid"


@pytest.mark.parametrize(
    "line",
    [
        {"raw": [0.2, 0.8], "right": [0.7, 0.1]},
        {"raw": [0.8, 0.2], "right": [0.1, 0.7]},
        {"raw": [0.5, 0.5], "right": [0.1, 0.7]},
        {"raw": [0.5], "right": [0.1]},
        {"raw": [0.2, 0.8, 0.9], "right": [0.1, 0.7]},
        {"raw": [0.2, float("nan")], "right": [0.1, 0.7]},
        {"raw": [0.2, 0.8], "right": [0.1, 1.7]},
    ],
)
def test_a_line_that_does_not_rise_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    with pytest.raises(PermanentError) as caught:
        load(tmp_path, {"format": 2, "knots": {"severity": line}})
    assert caught.value.code == "task.calibration_invalid"


SHARES = st.integers(0, 1000).map(lambda n: n / 1000)


@given(st.data(), st.sets(SHARES, min_size=2, max_size=12), st.lists(SHARES, min_size=2, max_size=30))
def test_a_surer_answer_is_never_published_as_less_sure(data: Any, raw: set[float], asked: list[float]) -> None:
    right = sorted(data.draw(st.lists(SHARES, min_size=len(raw), max_size=len(raw))))
    line = Knots(raw=tuple(sorted(raw)), right=tuple(right))
    published = [line.read(p) for p in sorted(asked)]
    assert all(after >= before for before, after in pairwise(published))
    assert all(0 <= p <= 1 for p in published)


def test_only_the_field_with_a_line_is_read_off_it(tmp_path: Path) -> None:
    found = load(tmp_path, {"format": 2, "knots": {"stop": LINE}})
    assert found.published({"severity": 0.5, "stop": 0.5, "minutes": 1.0}) == pytest.approx(
        {"severity": 0.5, "stop": 0.4, "minutes": 1.0}
    )
    assert found.published({"severity": 0.5, "stop": 0.0, "minutes": 1.0})["stop"] == pytest.approx(0.1)
