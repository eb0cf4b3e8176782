"""What travels when a device asks: the question, its answer, and what a decision says of both afterwards."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from edge_agent.contract.escalation import Destination
from edge_agent.contract.event import Scalar
from edge_agent.contract.payload import Payload

Outcome = Literal[
    "answered",
    "declined",
    "timed_out",
    "rejected",
    "failed",
    "over_budget",
    "backlog_full",
    "not_configured",
    "nothing_to_share",
]
"""How an escalation ended. ``answered`` gives route ``escalated``; every other one leaves the device's best guess."""


class Hint(Payload):
    """The device's best guess, where the task lets it out."""

    decision: dict[str, Any]
    unsure_fields: tuple[str, ...]


class EscalationRequest(Payload):
    """``escalations/<task>/<decision_id>``: a question to a person or a service."""

    schema_version: Literal[1] = 1
    decision_id: str
    task: str
    task_version: int
    answer_schema: dict[str, Any]
    event: dict[str, Scalar]
    hint: Hint | None = None
    answer_topic: str
    answer_within_s: float
    timestamp_ms: int


class EscalationAnswer(Payload):
    """``escalations-answers/<task>/<decision_id>``: the answer; a ``decision`` of null declines the question."""

    schema_version: Literal[1] = 1
    decision: dict[str, Any] | None
    answered_by: str | None = Field(default=None, max_length=64)


class Escalation(Payload):
    """What a decision says about its escalation.

    Args:
        to: whom the task wanted asked.
        outcome: how it ended.
        reason: error code, where a fault ended it.
        latency_ms: from the device's answer to the end; None where a restart of the machine lies between.
        model: the larger model, as the site's settings name it.
        answered_by: who answered over MQTT, as they call themselves.
    """

    to: Destination
    outcome: Outcome
    reason: str | None = None
    latency_ms: float | None = None
    model: str | None = None
    answered_by: str | None = None
