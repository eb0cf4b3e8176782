"""A router, its specialist and its check on the real model: one bundle, one worker, no code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from edge_agent.answering import decision_of
from edge_agent.contract.event import Event
from edge_agent.contract.messages import Decision, model_ref
from edge_agent.errors import EdgeError
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings
from tests.fakes.bundles import BundleVariant

HYDRAULIC: Event = {"machine": "press-4", "code": "E217", "text": "hydraulic pressure below setpoint for 12 s"}
ELECTRICAL: Event = {"machine": "press-4", "code": "E301", "text": "motor overload trip, phase current 180 %"}
CALM = {"safe": {"type": "boolean"}}


def narrowed(task: dict[str, Any], name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The reference task under another name, with other answers and no rules."""
    output = {"type": "object", "properties": properties}
    return {**task, "name": name, "output": output, "thresholds": {}, "guards": [], **more}


def published(engine: Engine, answer: Answer) -> str:
    """The payload of a decision."""
    model = model_ref(engine.bundle.manifest, engine.bundle.digest)
    return decision_of(answer, "triage", "e1", model).model_dump_json()


@pytest.fixture
def routed(variant: Callable[[], BundleVariant]) -> Callable[..., BundleVariant]:
    """The reference bundle with a specialist that can only call, and a check that can say one thing only."""

    def make(*, safe: bool = True, **router: Any) -> BundleVariant:
        bundle = variant()
        file = bundle.path / "tasks/triage/task.yaml"
        task = yaml.safe_load(file.read_text())
        only = {"type": "string", "enum": ["call"]}
        fluids = narrowed(task, "fluids", {"action": only, "component": {"type": "string", "enum": ["pump", "valve"]}})
        always = {
            "name": "always",
            "when": [{"event": "machine", "equals": "press-4"}],
            "then": {"safe": {"equals": safe}},
        }
        check = narrowed(task, "check", CALM, guards=[always])
        handoff = [{"when": {"category": ["hydraulic", "pneumatic"]}, "to": "fluids"}]
        bundle.drop("tasks/triage/golden.jsonl")
        for one in ({**task, "handoff": handoff, **router}, fluids, check):
            bundle.put(f"tasks/{one['name']}/task.yaml", json.dumps(one))
        bundle.seal()
        return bundle

    return make


VETO = {"task": "check", "when": {"safe": [False]}, "then": {"action": {"equals": "stop"}}}


def test_an_event_goes_to_the_specialist_that_its_category_names(
    routed: Callable[..., BundleVariant], engine: Engine
) -> None:
    router = Engine(routed().open(), 1)
    alone = router.decide("fluids", HYDRAULIC, deadline_s=60)
    before = engine.decide("triage", HYDRAULIC, deadline_s=60)
    answer = router.decide("triage", HYDRAULIC, deadline_s=60)
    assert answer.specialist == "fluids"
    assert answer.decision == {**before.decision, **alone.decision}
    assert answer.confidence == {**before.confidence, **alone.confidence}
    assert answer.tokens_out == before.tokens_out + alone.tokens_out
    other = router.decide("triage", ELECTRICAL, deadline_s=60)
    assert other.specialist is None
    assert other.decision == engine.decide("triage", ELECTRICAL, deadline_s=60).decision


def test_order_of_events_changes_no_answer_of_a_router(routed: Callable[..., BundleVariant]) -> None:
    router = Engine(routed(veto=VETO).open(), 1)
    first = [router.decide("triage", event, deadline_s=60).decision for event in (HYDRAULIC, ELECTRICAL)]
    again = [router.decide("triage", event, deadline_s=60).decision for event in (ELECTRICAL, HYDRAULIC)]
    assert first == again[::-1]


def test_a_check_that_says_no_stops_the_machine(routed: Callable[..., BundleVariant]) -> None:
    answer = Engine(routed(safe=False, veto=VETO).open(), 1).decide("triage", HYDRAULIC, deadline_s=60)
    assert (answer.decision["action"], answer.vetoed, answer.specialist) == ("stop", "check", "fluids")


def test_a_bundle_whose_routing_cannot_be_followed_does_not_load(routed: Callable[..., BundleVariant]) -> None:
    bundle = routed(veto={**VETO, "task": "nobody"})
    with pytest.raises(EdgeError) as caught:
        Engine(bundle.open(), 1)
    assert caught.value.code == "task.routing_invalid"


@pytest.fixture
def worker(routed: Callable[..., BundleVariant], worker_settings: WorkerSettings) -> Iterator[WorkerProcess]:
    bundle = routed(safe=False, veto=VETO)
    process = WorkerProcess(bundle.path, bundle.digest, worker_settings)
    process.start()
    yield process
    process.stop()


def test_the_way_of_an_answer_crosses_the_process_and_reaches_the_payload(
    worker: WorkerProcess, engine: Engine
) -> None:
    answer = worker.decide("triage", HYDRAULIC, 60.0)
    payload = json.loads(published(engine, answer))
    assert (payload["specialist"], payload["vetoed"]) == ("fluids", "check")


def test_a_payload_without_routing_looks_as_it_did_before_there_was_any(engine: Engine) -> None:
    answer = engine.decide("triage", HYDRAULIC, deadline_s=60)
    payload = published(engine, answer)
    assert not {"specialist", "vetoed"} & json.loads(payload).keys()
    assert Decision.model_validate_json(payload).specialist is None
