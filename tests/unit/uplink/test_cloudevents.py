from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.contract.messages import Decision
from edge_agent.uplink.cloudevents import decision_message, render
from edge_agent.uplink.records import OutboundMessage
from tests.fakes.node import DECISIONS, TOPICS, decision_of


def decided(event_id: str, **changes: Any) -> OutboundMessage:
    decision = decision_of("triage", event_id).model_copy(update={"timestamp_ms": 1_764_000_000_123, **changes})
    return decision_message(decision, DECISIONS, TOPICS)


def test_binary_mode_carries_attributes_without_a_prefix_and_the_data_as_it_is() -> None:
    message = decided("7")
    wire = render(message, 42, is_v5=True)
    assert wire.content_type == "application/json"
    assert Decision.model_validate_json(wire.payload).event_id == "7"
    assert dict(wire.user_properties) == {
        "specversion": "1.0",
        "id": decision_of("triage", "7").decision_id,
        "source": "edge/v1/plant1/press-4",
        "type": "io.edge-agent.decision.v1",
        "subject": "7",
        "time": "2025-11-24T16:00:00.123Z",
        "sequence": "000000000042",
    }


def test_structured_mode_is_one_json_envelope_with_the_same_attributes_and_data() -> None:
    message = decided('quote-"-ü')
    binary, structured = render(message, 1, is_v5=True), render(message, 1, is_v5=False)
    envelope = json.loads(structured.payload)
    assert envelope.pop("data") == json.loads(binary.payload)
    assert envelope.pop("datacontenttype") == binary.content_type
    assert envelope == dict(binary.user_properties)
    assert (structured.content_type, structured.user_properties) == (None, ())


@pytest.mark.parametrize("is_v5", [True, False])
def test_what_is_no_cloudevent_goes_as_it_is(*, is_v5: bool) -> None:
    message = OutboundMessage("alarm/hot", b'{"a":1}', content_type="application/json")
    wire = render(message, 9, is_v5=is_v5)
    assert wire.payload == b'{"a":1}'
    assert wire.user_properties == ()
    assert wire.content_type == ("application/json" if is_v5 else None)


@pytest.mark.parametrize("event_id", ["nul-\0", "line\nbreak", "\u202eevil", "\ud800", "", "\x7f"])
def test_an_id_that_mqtt_forbids_becomes_a_printable_subject(event_id: str) -> None:
    message = decided("x")
    hostile = decision_message(
        decision_of("triage", "x").model_copy(update={"event_id": event_id.encode("utf-8", "replace").decode()}),
        DECISIONS,
        TOPICS,
    )
    subject = dict(hostile.user_properties)["subject"]
    assert subject
    assert subject.isprintable()
    subject.encode()
    assert dict(message.user_properties)["subject"] == "x"
