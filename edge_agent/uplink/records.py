"""What the spool keeps: rows of inbox, outbox, escalations and dead letters, as frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from edge_agent.contract.escalation import Destination

Priority = Literal["safety", "normal", "bulk"]
Klass = Literal["decision", "alarm", "telemetry"]

LANES: tuple[Priority, ...] = ("safety", "normal", "bulk")
"""Lanes in the order in which they are served; the last is displaced first."""

KLASSES: tuple[Klass, ...] = ("decision", "alarm", "telemetry")
"""Classes of outgoing messages; the last is dropped first when the outbox is full."""


class Acceptance(Enum):
    """What became of an event offered to the inbox."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"


Accepted = Acceptance.ACCEPTED
Duplicate = Acceptance.DUPLICATE


@dataclass(frozen=True, slots=True)
class InboxEvent:
    """An event that waits for its decision.

    Args:
        attempts: how often a worker has died over it.
        payload: the event's bytes as received.
    """

    inbox_id: int
    task: str
    event_id: str
    payload: bytes
    priority: Priority
    received_ms: int
    attempts: int

    def is_like(self, other: InboxEvent) -> bool:
        """Whether both are of one task and one lane, and may be answered together."""
        return (self.task, self.priority) == (other.task, other.priority)


@dataclass(frozen=True, slots=True)
class OutboundMessage:
    """A message in neutral form; `cloudevents.render` gives it the form of the negotiated protocol.

    Args:
        user_properties: name and value pairs. Where they hold ``specversion`` the message is a CloudEvent: binary
            mode on MQTT 5, a structured JSON envelope on 3.1.1.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    klass: Klass = "decision"
    content_type: str | None = None
    user_properties: tuple[tuple[str, str], ...] = ()

    @property
    def size_bytes(self) -> int:
        """What this message counts against the outbox's bound."""
        return len(self.topic.encode()) + len(self.payload) + sum(len(k) + len(v) for k, v in self.user_properties)


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A message in the outbox.

    Args:
        seq: order of sending over all classes; never reused.
        class_seq: 1, 2, 3, … within its class, so that a consumer sees a gap where a message was dropped.
    """

    seq: int
    class_seq: int
    message: OutboundMessage
    queued_ms: int


@dataclass(frozen=True, slots=True)
class BuriedEvent:
    """A dead letter: an event that got no decision, and why.

    Args:
        payload: the bytes as received, or None where they were too large to keep.
    """

    dead_letter_id: int
    event_id: str | None
    task: str | None
    payload: bytes | None
    priority: Priority
    received_ms: int
    buried_ms: int
    code: str
    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class NewEscalation:
    """What an event takes along when it leaves the inbox to be asked about elsewhere.

    Args:
        decision_id: of the decision that it will get, whoever answers.
        guess: the device's best guess, a decision in JSON.
        spec: the task as it was when the device answered, in JSON: an update may bring another one meanwhile.
        boot_id: names the start of the machine that ``begun_ms`` counts from.
        begun_ms: time since that start.
        timeout_ms: how long an answer is waited for.
    """

    decision_id: str
    destination: Destination
    guess: bytes
    spec: bytes
    boot_id: str
    begun_ms: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class EscalationRow:
    """An escalation that waits, as far as its fate depends on it.

    Args:
        power_cuts: how often the machine has started anew since the question.
        attempts: how often it was put to the server.
    """

    escalation_id: int
    destination: Destination
    boot_id: str
    begun_ms: int
    timeout_ms: int
    power_cuts: int
    attempts: int


@dataclass(frozen=True, slots=True)
class EscalationCase:
    """The content of an escalation: see `NewEscalation`; ``payload`` is the event as received."""

    row: EscalationRow
    payload: bytes
    guess: bytes
    spec: bytes


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """What a task may still ask: ``credit`` questions at ``at_ms`` after the machine's start ``boot_id``."""

    credit: float
    boot_id: str
    at_ms: int
