"""Escalation, as a task declares it: whom it asks when it is unsure, and what may leave the device for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen

from edge_agent.contract.document import Strict
from edge_agent.contract.event import MAX_FIELDS, Event, Scalar
from edge_agent.contract.output import BoolField, EnumField, IntField, OutputField, TextField

Destination = Literal["http", "mqtt"]


@dataclass(frozen=True, kw_only=True)
class EscalationSpec(Strict):
    """Section ``escalation`` of a task file: where its unsure answers are asked for, and what may leave the device.

    Args:
        to: whom it asks.
        timeout_s: afterwards the best guess is published.
        budget_per_hour: tokens of the bucket, and its refill an hour.
        share: event fields that may leave the device.
        hint: send the device's best guess along.
    """

    to: Destination
    timeout_s: Annotated[float, Gt(0), Le(86_400)] = 30.0
    budget_per_hour: Annotated[int, Ge(1), Le(3600)] = 60
    share: Annotated[tuple[Annotated[str, MinLen(1), MaxLen(128)], ...], MaxLen(MAX_FIELDS)] = ()
    hint: bool = False

    def __post_init__(self) -> None:
        if len(set(self.share)) != len(self.share):
            raise ValueError("share names a field twice")
        # A model that sees nothing of the event answers all the same, within the schema: a guess that looks better.
        if self.to == "http" and not self.share:
            raise ValueError("to: http needs share: a model that is shown nothing of the event can only guess")

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
