"""Routing as engineers mistype it: every task of the bundle alone is fine, and together they cannot be followed."""

from __future__ import annotations

from typing import Any

import pytest

from edge_agent.contract.document import read_document
from edge_agent.contract.routing import check_routing, matches
from edge_agent.contract.task import TaskSpec, parse_task
from edge_agent.errors import PermanentError

ROUTER = {
    "kind": {"enum": ["fluid", "power", "other"]},
    "action": {"enum": ["log", "call", "stop"]},
    "urgent": {"type": "boolean"},
    "rank": {"type": "integer", "minimum": 1, "maximum": 9},
    "note": {"type": "string", "maxLength": 20},
}


def task(name: str, properties: dict[str, Any], **more: Any) -> TaskSpec:
    return read_document(
        TaskSpec,
        {
            "name": name,
            "version": 1,
            "prompt": {"prefix": "p", "event": [{"field": "text", "label": "text"}]},
            "output": {"type": "object", "properties": properties},
            **more,
        },
    )


def router(*, to: str = "fluids", when: dict[str, Any] | None = None, **more: Any) -> TaskSpec:
    return task("router", ROUTER, handoff=[{"when": when or {"kind": ["fluid"]}, "to": to}], **more)


def check(properties: dict[str, Any] | None = None, **more: Any) -> TaskSpec:
    return task("check", properties or {"safe": {"type": "boolean"}}, **more)


VETO: dict[str, Any] = {"task": "check", "when": {"safe": [False]}, "then": {"action": {"equals": "stop"}}}
FLUIDS = task("fluids", {"action": {"enum": ["stop", "call"]}, "rank": {"type": "integer", "minimum": 2, "maximum": 9}})


def faults(*tasks: TaskSpec) -> str:
    with pytest.raises(PermanentError) as caught:
        check_routing({one.name: one for one in tasks})
    assert caught.value.code == "task.routing_invalid"
    return caught.value.detail


def test_a_specialist_that_answers_part_of_the_router_and_a_check_are_accepted() -> None:
    check_routing({one.name: one for one in (router(veto=VETO), FLUIDS, check())})


def test_a_specialist_that_is_not_in_the_bundle_is_named() -> None:
    assert "'fluids', which is not in the bundle" in faults(router())


def test_a_check_that_is_not_in_the_bundle_is_named() -> None:
    assert "'check', which is not in the bundle" in faults(task("router", ROUTER, veto=VETO))


def test_a_router_that_hands_events_to_itself_is_refused() -> None:
    assert "to itself" in faults(router(to="router"))


def test_a_task_that_vetoes_itself_is_refused() -> None:
    own = {**VETO, "task": "router", "when": {"urgent": [True]}}
    assert "vetoes itself" in faults(task("router", ROUTER, veto=own))


def test_two_tasks_that_hand_events_to_each_other_are_refused() -> None:
    back = task("fluids", ROUTER, handoff=[{"when": {"kind": ["power"]}, "to": "router"}])
    found = faults(router(), back)
    assert "specialist 'fluids' hands off" in found
    assert "specialist 'router' hands off" in found


def test_a_specialist_whose_own_veto_would_be_passed_over_is_refused() -> None:
    careful = task("fluids", ROUTER, veto=VETO)
    assert "specialist 'fluids' hands off or vetoes" in faults(router(), careful, check())


def test_a_check_that_is_itself_vetoed_is_refused() -> None:
    checked = check(veto={"task": "fluids", "when": {"action": ["stop"]}, "abstain": True})
    assert "check 'check' hands off or vetoes" in faults(router(veto=VETO), FLUIDS, checked)


@pytest.mark.parametrize(
    ("properties", "named"),
    [
        ({"colour": {"enum": ["red"]}}, "answers 'colour', which the router does not"),
        ({"action": {"enum": ["stop", "explode"]}}, "may answer 'action' with what the router cannot"),
        ({"rank": {"type": "integer", "minimum": 0, "maximum": 9}}, "may answer 'rank'"),
        ({"rank": {"type": "integer", "minimum": 1, "maximum": 10}}, "may answer 'rank'"),
        ({"note": {"type": "string", "maxLength": 21}}, "may answer 'note'"),
        ({"urgent": {"enum": ["true", "false"]}}, "may answer 'urgent'"),
        ({"kind": {"type": "boolean"}}, "may answer 'kind'"),
    ],
)
def test_a_specialist_that_could_leave_the_routers_schema_is_refused(properties: dict[str, Any], named: str) -> None:
    assert named in faults(router(), task("fluids", properties))


@pytest.mark.parametrize(
    ("when", "named"),
    [
        ({"kind": ["fluids"]}, "'fluids' is not an answer of 'kind'"),
        ({"sort": ["fluid"]}, "answers no field 'sort'"),
        ({"urgent": [1]}, "1 is not an answer of 'urgent'"),
        ({"rank": [True]}, "True is not an answer of 'rank'"),
        ({"rank": [99]}, "99 is not an answer"),
        ({"note": ["x"]}, "'note' is text"),
    ],
)
def test_a_rule_that_could_never_match_is_refused(when: dict[str, Any], named: str) -> None:
    assert named in faults(router(when=when), FLUIDS)


def test_a_veto_that_could_never_match_is_refused() -> None:
    assert "'no' is not an answer of 'safe'" in faults(
        task("router", ROUTER, veto={**VETO, "when": {"safe": ["no"]}}), check()
    )


def test_every_fault_of_a_bundle_is_listed_at_once() -> None:
    found = faults(router(when={"sort": ["fluid"]}, veto=VETO))
    assert found.count(";") == 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("handoff: [{when: {}, to: fluids}]", "handoff"),
        ("handoff: [{when: {kind: []}, to: fluids}]", "handoff"),
        ("handoff: [{when: {kind: [fluid]}}]", "to"),
        ("handoff: [{when: {kind: [fluid]}, too: fluids}]", "too"),
        ("veto: {task: check, when: {safe: [false]}}", "exactly one of: then, abstain"),
        ("veto: {task: check, when: {safe: [false]}, then: {kind: {equals: a}}, abstain: true}", "exactly one"),
        ("veto: {task: check, when: {safe: [false]}, then: {colour: {equals: red}}}", "unknown field 'colour'"),
        ("veto: {task: check, when: {safe: [false]}, then: {kind: {equals: c}}}", "'c' is not a value of 'kind'"),
        ("veto: {task: check, when: {safe: [false]}, abstain: true, min_confidence: 1.5}", "min_confidence"),
    ],
)
def test_a_fault_that_one_task_file_shows_is_refused_with_the_file(more: str, named: str) -> None:
    text = (
        "name: router\nversion: 1\nprompt: {prefix: p, event: [{field: text, label: text}]}\n"
        "output: {type: object, properties: {kind: {enum: [a, b]}}}\n"
    )
    parse_task(text)
    with pytest.raises(PermanentError, match=named) as caught:
        parse_task(text + more)
    assert caught.value.code == "task.invalid"


def test_one_is_not_true_and_zero_is_not_false() -> None:
    assert matches({"urgent": (True,)}, {"urgent": True})
    assert not matches({"urgent": (1,)}, {"urgent": True})
    assert not matches({"rank": (True,)}, {"rank": 1})


def test_every_field_of_a_rule_must_match() -> None:
    answer = {"kind": "fluid", "urgent": False}
    assert matches({"kind": ("fluid", "power"), "urgent": (False,)}, answer)
    assert not matches({"kind": ("fluid",), "urgent": (True,)}, answer)
