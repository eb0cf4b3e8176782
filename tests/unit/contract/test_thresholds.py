"""Thresholds as engineers write them, and the floors that a device makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edge_agent.contract.document import DocumentError, read_document
from edge_agent.contract.task import TaskSpec, parse_task
from edge_agent.contract.thresholds import ALWAYS_UNSURE, ChosenFloor, ErrorTarget, Floors, error_targets, floors_of
from edge_agent.errors import PermanentError
from tests.unit.contract.test_task import TASK


def task_with(threshold: str) -> TaskSpec:
    return parse_task(TASK.replace("thresholds: {severity: 0.7}", f"thresholds: {{severity: {threshold}}}"))


def chosen(floor: float | None = 0.9, **changes: Any) -> ChosenFloor:
    made: dict[str, Any] = {"max_wrong": 0.01, "certainty": 0.95, "floor": floor, "events": 9, "passed": 5, "wrong": 1}
    return read_document(ChosenFloor, {**made, **changes})


def test_a_number_is_a_floor_as_it_always_was() -> None:
    floors = floors_of(task_with("0.7").thresholds, {})
    assert floors.unsure({"severity": 0.7}) == ()
    assert floors.unsure({"severity": math.nextafter(0.7, 0)}) == ("severity",)
    assert floors.hopeless({"severity": 0.0}) == ()


def test_two_floors_leave_a_room_between_them_where_the_guess_is_a_hint() -> None:
    floors = floors_of(task_with("{escalate: 0.6, abstain: 0.3}").thresholds, {})
    found = [(floors.unsure({"severity": p}), floors.hopeless({"severity": p})) for p in (0.6, 0.5, 0.3, 0.2)]
    name = ("severity",)
    assert found == [((), ()), (name, ()), (name, ()), (name, name)]


@pytest.mark.parametrize(
    ("threshold", "named"),
    [
        ("{max_wrong: 0}", "greater than 0"),
        ("{max_wrong: 1}", "less than 1"),
        ("{max_wrong: -0.1}", "greater than 0"),
        ("{max_wrong: .nan}", "severity"),
        ("{max_wrong: 0.01, certainty: 1}", "certainty"),
        ("{max_wrong: 0.01, certainty: 0.2}", "certainty"),
        ("{max_wrong: 0.01, certianty: 0.9}", "certianty"),
        ("{max_wrong: 0.01, abstain: 2}", "abstain"),
        ("{max_wrong: 0.01, escalate: 0.5}", "escalate"),
        ("{max_wrong: little}", "max_wrong"),
        ("{escalate: 0.3, abstain: 0.6}", "above escalate"),
        ("{abstain: 0.2}", "escalate"),
        ("{}", "escalate"),
        ("1.5", "less than or equal to 1"),
        (".nan", "severity"),
        (".inf", "severity"),
        ("[0.5]", "severity"),
        ("null", "severity"),
        ("high", "number"),
    ],
)
def test_a_threshold_that_means_nothing_is_named_with_its_field(threshold: str, named: str) -> None:
    with pytest.raises(PermanentError, match=named) as caught:
        task_with(threshold)
    assert caught.value.code == "task.invalid"
    assert "severity" in caught.value.detail


def test_an_error_target_without_a_floor_is_refused_and_never_read_as_no_threshold() -> None:
    thresholds = task_with("{max_wrong: 0.01}").thresholds
    assert error_targets(thresholds) == {"severity": ErrorTarget(max_wrong=0.01)}
    with pytest.raises(PermanentError, match="no floor") as caught:
        floors_of(thresholds, {})
    assert caught.value.code == "task.calibration_invalid"


@pytest.mark.parametrize("changes", [{"max_wrong": 0.02}, {"certainty": 0.9}])
def test_a_floor_that_was_chosen_for_another_target_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(PermanentError, match="was chosen for") as caught:
        floors_of(task_with("{max_wrong: 0.01}").thresholds, {"severity": chosen(**changes)})
    assert caught.value.code == "task.calibration_invalid"


def test_where_no_floor_was_found_the_field_is_always_unsure() -> None:
    floors = floors_of(task_with("{max_wrong: 0.01}").thresholds, {"severity": chosen(None)})
    assert floors.escalate == {"severity": ALWAYS_UNSURE}
    assert floors.unsure({"severity": 1.0}) == ("severity",)


def test_abstain_never_makes_a_field_unsure_that_its_floor_lets_pass() -> None:
    floors = floors_of(task_with("{max_wrong: 0.01, abstain: 0.5}").thresholds, {"severity": chosen(0.2)})
    assert floors.unsure({"severity": 0.3}) == ()
    assert floors.hopeless({"severity": 0.3}) == ()


def test_a_floor_nobody_asks_for_any_more_does_not_change_a_fixed_one() -> None:
    assert floors_of(task_with("0.7").thresholds, {"severity": chosen(0.1)}).escalate == {"severity": 0.7}


def test_a_value_is_as_sure_as_all_that_it_was_written_after() -> None:
    target = task_with("{max_wrong: 0.01}").thresholds
    floors = floors_of(target, {"severity": chosen(0.5, over=("minutes", "severity"))})
    assert floors.unsure({"severity": 0.99, "minutes": 0.4}) == ("severity",)
    assert floors.unsure({"severity": 0.99, "minutes": 0.6}) == ()


def test_a_confidence_that_is_no_number_is_not_sure() -> None:
    assert Floors({"severity": 0.0}, {"severity": 0.0}).unsure({"severity": math.nan}) == ("severity",)


@pytest.mark.parametrize(
    "changes",
    [{"floor": math.nan}, {"floor": 1.5}, {"floor": -0.1}, {"wrong": 6}, {"passed": 10}, {"events": -1},
     {"max_wrong": 0.0}, {"max_wrong": math.nan}],
)  # fmt: skip
def test_a_floor_with_impossible_figures_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(DocumentError):
        chosen(**changes)
