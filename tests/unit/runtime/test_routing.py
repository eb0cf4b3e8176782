"""Router, specialist, check and guards: who has the last word, and what happens when one of them has no answer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edge_agent.contract.document import read_document
from edge_agent.contract.event import Event
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import EdgeError, PermanentError, RefusedError
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.calibration import load_calibration
from edge_agent.runtime.decoder import Decoded
from edge_agent.runtime.routing import OwnAnswer, decide

FIELDS = {"kind": {"enum": ["fluid", "power"]}, "action": {"enum": ["log", "call", "stop"]}}
Said = dict[str, tuple[Any, float]]


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


class Plant:
    """Tasks that say what they are told to, or fail as they are told to."""

    def __init__(self, **router: Any) -> None:
        self.tasks = {
            "router": task("router", FIELDS, thresholds={"kind": 0.6, "action": 0.6}, **router),
            "fluids": task("fluids", {"action": FIELDS["action"]}, thresholds={"action": 0.9}),
            "check": task("check", {"safe": {"type": "boolean"}}),
        }
        self.says: dict[str, Said | EdgeError] = {
            "router": {"kind": ("fluid", 0.95), "action": ("log", 0.7)},
            "fluids": {"action": ("call", 0.95)},
            "check": {"safe": (True, 0.99)},
        }
        self.asked: list[tuple[str, float]] = []
        self.known: set[str] = set()

    def ask(self, name: str, event: Event, deadline_at_s: float) -> OwnAnswer:
        self.asked.append((name, deadline_at_s))
        said = self.says[name]
        if isinstance(said, EdgeError):
            raise said
        values = {field: value for field, (value, _) in said.items()}
        sure = {field: confidence for field, (_, confidence) in said.items()}
        calibration = load_calibration(None, self.tasks[name])
        decoded = Decoded(values, sure, tokens=[1, 2, 3], asked=(1,), passes=2)
        return OwnAnswer(self.tasks[name], calibration, decoded, truncated=False, is_known=name in self.known)

    def decide(self, deadline_at_s: float = math.inf, **event: Any) -> Answer:
        told = {"text": "x", **event}
        own = self.ask("router", told, deadline_at_s)
        return decide(self.ask, own, told, started_s=0.0, deadline_at_s=deadline_at_s)


HANDOFF = [{"when": {"kind": ["fluid"]}, "to": "fluids"}]
STOP: dict[str, Any] = {"task": "check", "when": {"safe": [False]}, "then": {"action": {"equals": "stop"}}}
ABSTAIN: dict[str, Any] = {"task": "check", "when": {"safe": [False]}, "abstain": True}


def test_the_specialists_word_replaces_the_routers() -> None:
    answer = Plant(handoff=HANDOFF).decide()
    assert answer.decision == {"kind": "fluid", "action": "call"}
    assert answer.confidence == {"kind": 0.95, "action": 0.95}
    assert (answer.specialist, answer.vetoed, answer.route) == ("fluids", None, "device")
    assert (answer.passes, answer.tokens_out) == (4, 6)


def test_an_answer_is_from_memory_only_where_every_part_is() -> None:
    plant = Plant(handoff=HANDOFF)
    plant.known = {"router"}
    half = plant.decide()
    plant.known = {"router", "fluids"}
    whole = plant.decide()
    assert [(one.route, one.passes) for one in (half, whole)] == [("device", 2), ("cache", 0)]


def test_an_event_that_is_not_the_specialists_stays_with_the_router() -> None:
    plant = Plant(handoff=HANDOFF)
    plant.says["router"] = {"kind": ("power", 0.95), "action": ("log", 0.7)}
    answer = plant.decide()
    assert (answer.decision["action"], answer.specialist) == ("log", None)
    assert [name for name, _ in plant.asked] == ["router"]


def test_of_two_rules_that_match_the_first_wins() -> None:
    rules = [{"when": {"action": ["log"]}, "to": "check"}, *HANDOFF]
    plant = Plant(handoff=rules)
    plant.tasks["check"], plant.says["check"] = plant.tasks["fluids"], {"action": ("stop", 1.0)}
    assert plant.decide().specialist == "check"


def test_each_field_is_held_to_the_threshold_of_the_task_that_answered_it() -> None:
    plant = Plant(handoff=HANDOFF)
    plant.says["fluids"] = {"action": ("call", 0.8)}  # sure enough for the router, not for the specialist
    answer = plant.decide()
    assert (answer.route, answer.unsure_fields) == ("abstained", ("action",))


def test_a_routers_doubt_about_what_the_specialist_answers_is_forgotten() -> None:
    plant = Plant(handoff=HANDOFF)
    plant.says["router"] = {"kind": ("fluid", 0.95), "action": ("log", 0.1)}
    assert plant.decide().route == "device"


def test_a_specialist_that_fails_fails_the_event_and_the_router_does_not_stand_in() -> None:
    plant = Plant(handoff=HANDOFF)
    for code in ("worker.deadline", "worker.bad_logits", "event.no_known_field"):
        plant.says["fluids"] = PermanentError(code, "no answer")
        with pytest.raises(EdgeError) as caught:
            plant.decide()
        assert caught.value.code == code


def test_all_three_work_against_one_deadline() -> None:
    plant = Plant(handoff=HANDOFF, veto=STOP)
    plant.decide(deadline_at_s=17.0)
    assert plant.asked == [("router", 17.0), ("fluids", 17.0), ("check", 17.0)]


def test_a_check_that_says_no_overrules_the_specialist() -> None:
    plant = Plant(handoff=HANDOFF, veto=STOP)
    plant.says["check"] = {"safe": (False, 0.8)}
    answer = plant.decide()
    assert answer.decision == {"kind": "fluid", "action": "stop"}
    assert (answer.specialist, answer.vetoed, answer.route) == ("fluids", "check", "rule")


def test_a_veto_may_leave_the_whole_decision_to_somebody_else() -> None:
    plant = Plant(veto=ABSTAIN)
    plant.says["check"] = {"safe": (False, 0.8)}
    answer = plant.decide()
    assert (answer.route, answer.unsure_fields, answer.vetoed) == ("abstained", ("kind", "action"), "check")
    assert answer.decision["action"] == "log"


def test_an_unsure_veto_vetoes_all_the_same() -> None:
    plant = Plant(veto={**STOP, "min_confidence": 0.9})
    plant.says["check"] = {"safe": (False, 0.51)}
    assert plant.decide().decision["action"] == "stop"


def test_an_unsure_pass_is_no_pass() -> None:
    plant = Plant(veto={**STOP, "min_confidence": 0.9})
    plant.says["check"] = {"safe": (True, 0.89)}
    answer = plant.decide()
    assert (answer.route, answer.unsure_fields, answer.vetoed) == ("abstained", ("action",), "check: unsure")
    assert answer.decision["action"] == "log"


def test_the_checks_own_threshold_counts_too() -> None:
    plant = Plant(veto=STOP)
    plant.tasks["check"] = task("check", {"safe": {"type": "boolean"}}, thresholds={"safe": 0.995})
    assert plant.decide().route == "abstained"


@pytest.mark.parametrize(
    "fault",
    [
        PermanentError("worker.deadline", "too late"),
        RefusedError("event.no_known_field", "nothing to read"),
        RefusedError("event.too_long", "too long"),
    ],
    ids=lambda fault: fault.code,
)
@pytest.mark.parametrize(("veto", "unsure"), [(STOP, ("action",)), (ABSTAIN, ("kind", "action"))])
def test_an_unchecked_decision_is_never_published_as_a_sure_one(
    fault: EdgeError, veto: dict[str, Any], unsure: tuple[str, ...]
) -> None:
    plant = Plant(veto=veto)
    plant.says["check"] = fault
    answer = plant.decide()
    assert (answer.route, answer.unsure_fields) == ("abstained", unsure)
    assert answer.vetoed == f"check: {fault.code}"


@pytest.mark.parametrize("code", ["worker.bad_logits", "worker.out_of_memory", "worker.inference"])
def test_a_broken_model_in_the_check_is_an_error_that_probation_sees(code: str) -> None:
    plant = Plant(veto=STOP)
    plant.says["check"] = PermanentError(code, "broken")
    with pytest.raises(PermanentError) as caught:
        plant.decide()
    assert caught.value.code == code


def test_a_veto_that_changes_nothing_leaves_the_route_alone() -> None:
    plant = Plant(veto=STOP)
    plant.says |= {
        "router": {"kind": ("fluid", 0.95), "action": ("stop", 0.7)},
        "check": {"safe": (False, 0.8)},
    }
    answer = plant.decide()
    assert (answer.vetoed, answer.route) == ("check", "device")


def guard(name: str, field: str, value: Any) -> dict[str, Any]:
    return {"name": name, "when": [{"event": "code", "equals": "E1"}], "then": {field: {"equals": value}}}


def test_the_routers_guards_have_the_last_word_even_over_a_veto() -> None:
    plant = Plant(handoff=HANDOFF, veto=STOP, guards=[guard("call_first", "action", "call")])
    plant.says["check"] = {"safe": (False, 0.8)}
    answer = plant.decide(code="E1")
    assert (answer.decision["action"], answer.guards, answer.vetoed) == ("call", ("call_first",), "check")
    assert plant.decide(code="E2").decision["action"] == "stop"


def test_a_specialists_and_a_checks_own_guards_count_and_are_named_with_their_task() -> None:
    plant = Plant(handoff=HANDOFF, veto=STOP)
    plant.tasks["fluids"] = task("fluids", {"action": FIELDS["action"]}, guards=[guard("louder", "action", "stop")])
    plant.tasks["check"] = task("check", {"safe": {"type": "boolean"}}, guards=[guard("never", "safe", value=False)])
    answer = plant.decide(code="E1")
    assert answer.guards == ("fluids.louder", "check.never")
    assert (answer.decision["action"], answer.vetoed) == ("stop", "check")


def test_the_router_is_matched_before_its_guards() -> None:
    plant = Plant(handoff=HANDOFF, guards=[guard("power", "kind", "power")])
    answer = plant.decide(code="E1")
    assert (answer.specialist, answer.decision["kind"]) == ("fluids", "power")
