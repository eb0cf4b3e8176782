"""What comes back is hostile: only one JSON object that is an answer of the task gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.contract.escalation_messages import Escalation
from edge_agent.errors import RefusedError
from edge_agent.escalation.answers import MAX_ANSWER_BYTES, answer_of_payload, answer_of_text, ended
from tests.fakes.escalations import EVENT, GOOD, case_of, guess_of, task_of

TASK = task_of()
PLAIN = json.dumps(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"  \n{PLAIN}\n",
        json.dumps(GOOD, indent=2),
        json.dumps(dict(reversed(GOOD.items()))),
        f"```json\n{PLAIN}\n```",
        f"Sure! Here is the answer:\n\n{PLAIN}\n\nLet me know if {{more}} is needed.",
        f"<think>the set {{a, b}} is {{unclear</think>{PLAIN}",
    ],
    ids=["plain", "padded", "indented", "reordered", "fenced", "in prose", "after thoughts"],
)
def test_one_valid_object_is_an_answer_wherever_it_stands(text: str) -> None:
    answer = answer_of_text(text, TASK)
    assert answer == GOOD
    assert list(answer) == list(GOOD), "in the schema's order"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot help with that.",
        "null",
        "[]",
        f"[{PLAIN}]",
        json.dumps(PLAIN),
        "42",
        PLAIN[:-1],
        f"{PLAIN}{PLAIN}",
        f"either {PLAIN} or {json.dumps({**GOOD, 'severity': 'low'})}",
        PLAIN.replace("5", "NaN"),
        PLAIN.replace("5", "Infinity"),
        PLAIN.replace("5", "-Infinity"),
        PLAIN.replace("5", "9" * 5000),
        PLAIN.replace('"stop"', '"minutes"'),
        PLAIN[:-1] + ', "severity": "low"}',
        "[" * 100_000,
        '{"a":' * 50_000,
        "{" * 60_000,
        " " * (MAX_ANSWER_BYTES + 1),
    ],
    ids=lambda text: text[:24],
)
def test_what_is_not_one_object_is_refused(text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        answer_of_text(text, TASK)
    assert caught.value.code in {"escalation.answer_not_json", "escalation.answer_outside_schema"}


@pytest.mark.parametrize(
    "change",
    [
        {"severity": "catastrophic"},
        {"severity": "HIGH"},
        {"severity": None},
        {"severity": ["low"]},
        {"severity": {"low": "low"}},
        {"stop": "true"},
        {"stop": 1},
        {"minutes": 61},
        {"minutes": -1},
        {"minutes": 5.0},
        {"minutes": True},
        {"minutes": "5"},
        {"minutes": 10**4000},
        {"note": "x" * 41},
        {"note": "two\nlines"},
        {"note": "\ud800"},
        {"note": "\x1b[2J"},
        {"note": "\u202egnol"},
        {"extra": 1},
        {"__proto__": {}},
    ],
    ids=str,
)
def test_an_answer_outside_the_schema_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        answer_of_text(json.dumps({**GOOD, **change}), TASK)
    assert caught.value.code == "escalation.answer_outside_schema"
    assert len(caught.value.detail) <= 300


@pytest.mark.parametrize("name", list(GOOD))
def test_an_answer_that_lacks_a_field_is_refused(name: str) -> None:
    with pytest.raises(RefusedError, match="missing"):
        answer_of_text(json.dumps({k: v for k, v in GOOD.items() if k != name}), TASK)


def test_a_guard_runs_last_also_on_the_larger_models_answer_and_is_named() -> None:
    case = case_of(event={**EVENT, "code": "FIRE"})
    decision = ended(case, Escalation(to="http", outcome="answered"), {**GOOD, "severity": "low"}, 77)
    assert (decision.decision["severity"], decision.guards, decision.route) == ("high", ("fire_is_high",), "escalated")
    assert decision.decision_id == guess_of().decision_id
    assert decision.timestamp_ms == 77


def test_without_an_answer_the_best_guess_is_published_with_the_reason() -> None:
    escalation = Escalation(to="http", outcome="timed_out", reason="escalation.no_answer")
    decision = ended(case_of(), escalation, None, 77)
    guess = guess_of()
    assert (decision.route, decision.decision, decision.unsure_fields) == ("abstained", guess.decision, ("severity",))
    assert decision.escalation == escalation


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"decision": 7}',
        b'{"decision": [1]}',
        b'{"schema_version": 2, "decision": null}',
        b'{"decision": null, "answered_by": "' + b"x" * 65 + b'"}',
        b'{"decision": null, "decision": {}}',
        b'{"decision": {"minutes": NaN}}',
        b"[" * 50_000,
        b" " * (MAX_ANSWER_BYTES + 1),
    ],
    ids=lambda payload: payload[:24],
)
def test_a_message_that_is_no_answer_is_refused(payload: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        answer_of_payload(payload)
    assert caught.value.code == "escalation.answer_invalid"


def test_unknown_fields_of_an_answers_message_are_ignored() -> None:
    answer = answer_of_payload(b'{"schema_version": 1, "decision": {"a": 1}, "answered_by": "ann", "shift": 3}')
    assert (answer.decision, answer.answered_by) == ({"a": 1}, "ann")
