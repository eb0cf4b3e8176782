"""What came back is hostile until it has proved otherwise: from bytes to an answer of the task, or to a refusal.

An answer is one JSON object that holds exactly the task's fields, with values of the task's schema. It may stand in
prose or between fences, because models talk; two objects are no answer, because nobody knows which was meant.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from edge_agent.contract.escalation_messages import Escalation, EscalationAnswer
from edge_agent.contract.messages import Decision
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import RefusedError
from edge_agent.escalation.ports import Case

MAX_ANSWER_BYTES = 64 * 1024
# Each costs one attempt to parse: a text of nothing but braces must not become a day's work.
_MAX_BRACES = 64
_MAX_DETAIL_CHARS = 300


def answer_of_text(text: str, task: TaskSpec) -> dict[str, Any]:
    """The answer in a model's text.

    Returns:
        Schema-valid, in the schema's order, before guards.

    Raises:
        RefusedError: ``escalation.answer_not_json`` or ``escalation.answer_outside_schema``.
    """
    if len(text) > MAX_ANSWER_BYTES:
        raise RefusedError("escalation.answer_not_json", f"an answer of {len(text)} characters is none")
    try:
        found = _decode(text.strip())
    except (ValueError, RecursionError):
        found = _only_object(text)
    return checked(found, task)


def answer_of_payload(payload: bytes) -> EscalationAnswer:
    """The answer in an MQTT message; its ``decision`` is still unchecked.

    Raises:
        RefusedError: ``escalation.answer_invalid``.
    """
    if len(payload) > MAX_ANSWER_BYTES:
        raise RefusedError("escalation.answer_invalid", f"an answer of {len(payload)} bytes is none")
    try:
        return EscalationAnswer.model_validate(_decode(payload.decode("utf-8")))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise RefusedError("escalation.answer_invalid", faults[:_MAX_DETAIL_CHARS]) from error
    except (ValueError, RecursionError) as error:
        raise RefusedError("escalation.answer_invalid", f"not valid JSON: {error}"[:_MAX_DETAIL_CHARS]) from error


def checked(found: Any, task: TaskSpec) -> dict[str, Any]:
    """Hold a decoded value against the task (see `answer_of_text` for what is returned and raised)."""
    if not isinstance(found, dict):
        raise RefusedError("escalation.answer_not_json", f"an answer is a JSON object, not {type(found).__name__}")
    problems = task.check_decision(found)
    # Unlike the device's own decoding, nothing has kept controls and lone surrogates out of these texts.
    problems += [
        f"field {n!r} is not printable" for n, v in found.items() if isinstance(v, str) and not v.isprintable()
    ]
    if problems:
        raise RefusedError("escalation.answer_outside_schema", "; ".join(problems)[:_MAX_DETAIL_CHARS])
    return {field.name: found[field.name] for field in task.output_fields}


def ended(case: Case, escalation: Escalation, answer: dict[str, Any] | None, now_ms: int) -> Decision:
    """The decision that ends an escalation.

    Args:
        case: what was asked.
        escalation: how it ended.
        answer: a checked answer, or None for the device's best guess.
        now_ms: wall clock, for the decision's timestamp.

    Returns:
        Confidence and unsure fields stay the device's: they say why it asked. Guards run last, also on this answer.
    """
    ending: dict[str, Any] = {"escalation": escalation, "timestamp_ms": now_ms}
    if answer is not None:
        decision, guards = case.task.apply_guards(case.event, answer)
        ending.update(decision=decision, guards=tuple(guards), route="escalated")
    return case.guess.model_copy(update=ending)


def _only_object(text: str) -> dict[str, Any]:
    objects: list[dict[str, Any]] = []
    at = -1
    for _ in range(_MAX_BRACES):
        at = text.find("{", at + 1)
        if at < 0:
            break
        try:
            found, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        objects.append(found)
        at = end - 1
    if len(objects) != 1:
        raise RefusedError("escalation.answer_not_json", f"{len(objects)} JSON objects in the answer, one is wanted")
    return objects[0]


def _decode(text: str) -> Any:
    found, end = _DECODER.raw_decode(text)
    if end != len(text):
        raise ValueError("something follows the value")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse_constant)
