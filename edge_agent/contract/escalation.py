"""Escalation: when a task asks something larger, what it asks, and what a decision says of it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_agent.contract.event import MAX_FIELDS, Event, Scalar
from edge_agent.contract.output import BoolField, EnumField, IntField, OutputField, TextField

Destination = Literal["http", "mqtt"]
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


class EscalationSpec(BaseModel):
    """Section ``escalation`` of a task file: where its unsure answers are asked for, and what may leave the device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: Destination
    timeout_s: float = Field(default=30.0, gt=0, le=86_400, description="afterwards the best guess is published")
    budget_per_hour: int = Field(default=60, ge=1, le=3600, description="tokens of the bucket, and its refill an hour")
    share: tuple[Annotated[str, Field(min_length=1, max_length=128)], ...] = Field(
        default=(), max_length=MAX_FIELDS, description="event fields that may leave the device"
    )
    hint: bool = Field(default=False, description="send the device's best guess along")

    @model_validator(mode="after")
    def _can_be_answered(self) -> Self:
        if len(set(self.share)) != len(self.share):
            raise ValueError("share names a field twice")
        # A model that sees nothing of the event answers all the same, within the schema: a guess that looks better.
        if self.to == "http" and not self.share:
            raise ValueError("to: http needs share: a model that is shown nothing of the event can only guess")
        return self

    def shared(self, event: Event) -> dict[str, Scalar]:
        """The part of ``event`` that may leave the device."""
        return {name: event[name] for name in self.share if event.get(name) is not None}


def answer_schema(fields: Sequence[OutputField]) -> dict[str, Any]:
    """The task's answer as a JSON Schema, made anew from what was read, so that nothing else of the file travels."""
    return {
        "type": "object",
        "properties": {field.name: _property(field) for field in fields},
        "required": [field.name for field in fields],
        "additionalProperties": False,
    }


def _property(field: OutputField) -> dict[str, Any]:
    match field:
        case EnumField():
            return {"type": "string", "enum": list(field.values)}
        case BoolField():
            return {"type": "boolean"}
        case IntField():
            return {"type": "integer", "minimum": field.minimum, "maximum": field.maximum}
        case TextField():
            return {"type": "string", "maxLength": field.max_length}


class _Payload(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Hint(_Payload):
    """The device's best guess, where the task lets it out."""

    decision: dict[str, Any]
    unsure_fields: tuple[str, ...]


class EscalationRequest(_Payload):
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


class EscalationAnswer(_Payload):
    """``escalations-answers/<task>/<decision_id>``: the answer; a ``decision`` of null declines the question."""

    schema_version: Literal[1] = 1
    decision: dict[str, Any] | None
    answered_by: str | None = Field(default=None, max_length=64)


class Escalation(_Payload):
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
