"""Decisions as CloudEvents 1.0 on MQTT.

Binary mode on MQTT 5: the data is the payload, ``datacontenttype`` is the Content Type property, every other attribute
is a User Property under its own name, without a prefix. Structured mode on MQTT 3.1.1, which has no properties: one
JSON envelope. Which of them is decided when a message is published, because the outbox may outlive a broker's upgrade.

Source: CloudEvents MQTT Protocol Binding 1.0.2, sections 3.1 and 3.2; JSON Event Format 1.0.2; Sequence extension.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_agent.contract.event import printable
from edge_agent.contract.messages import Decision
from edge_agent.contract.topics import NodeTopics
from edge_agent.uplink.records import OutboundMessage
from edge_agent.uplink.spool_rows import as_text

SPEC_VERSION = "1.0"
DECISION_TYPE = "io.edge-agent.decision.v1"
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class WireMessage:
    """A message as the negotiated protocol carries it."""

    topic: str
    payload: bytes
    content_type: str | None
    user_properties: tuple[tuple[str, str], ...]


def decision_message(decision: Decision, topic: str, topics: NodeTopics) -> OutboundMessage:
    """A decision as a CloudEvent in neutral form.

    Args:
        decision: what was decided; its id becomes the event's id, so that a repeated delivery is recognised.
        topic: where it is published.
        topics: names the source, ``edge/v1/<site>/<node>``.
    """
    at = datetime.fromtimestamp(decision.timestamp_ms / 1000, UTC)
    attributes = (
        ("specversion", SPEC_VERSION),
        ("id", decision.decision_id),
        ("source", topics.base),
        ("type", DECISION_TYPE),
        ("subject", _printable(decision.event_id)),
        ("time", at.isoformat(timespec="milliseconds").replace("+00:00", "Z")),
    )
    payload = decision.model_dump_json().encode()
    return OutboundMessage(topic, payload, klass="decision", content_type=JSON, user_properties=attributes)


def render(message: OutboundMessage, class_seq: int, *, is_v5: bool) -> WireMessage:
    """Give a queued message the form of the negotiated protocol.

    Args:
        message: as queued.
        class_seq: becomes the ``sequence`` attribute of a CloudEvent: contiguous, zero-padded so that it sorts as text.
        is_v5: MQTT 5 was negotiated.
    """
    is_event = any(name == "specversion" for name, _ in message.user_properties)
    attributes = message.user_properties
    if is_event:
        attributes = (*attributes, ("sequence", f"{class_seq:012d}"))
    if is_v5:
        return WireMessage(message.topic, message.payload, message.content_type, attributes)
    if not is_event:
        return WireMessage(message.topic, message.payload, None, ())
    head = json.dumps({**dict(attributes), "datacontenttype": message.content_type or JSON}, ensure_ascii=False)
    # The data is JSON already: embedded as it is, not parsed and printed again.
    return WireMessage(message.topic, head[:-1].encode() + b',"data":' + message.payload + b"}", None, ())


def _printable(value: str) -> str:
    # CloudEvents 1.0.2 section 3.1 (String) forbids control characters, MQTT forbids them in UTF-8 strings.
    return printable(as_text(value)) or "-"
