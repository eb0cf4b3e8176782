"""A demo that cannot fail proves nothing: every fault that it claims to exclude is planted here and must be noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.demo.ledger import Ledger, percentile
from edge_agent.contract.messages import Decision, ModelRef
from edge_agent.contract.task import TaskSpec, parse_task

TASK: TaskSpec = parse_task("""
name: triage
version: 1
prompt: {prefix: "p", event: [{field: text, label: text}]}
output:
  type: object
  properties:
    severity: {enum: [low, high]}
""")


def decision(event_id: str = "e1", *, decision_id: str = "d1", severity: str = "low", **over: Any) -> Decision:
    fields: dict[str, Any] = {
        "decision_id": decision_id,
        "event_id": event_id,
        "task": "triage",
        "model": ModelRef(name="m", version="1.0.0", digest="a" * 64),
        "decision": {"severity": severity},
        "confidence": {"severity": 0.9},
        "route": "device",
        "latency_ms": 5.0,
        "timestamp_ms": 1_000,
    }
    return Decision(**{**fields, **over})


def binary(made: Decision) -> bytes:
    return made.model_dump_json().encode()


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger(TASK)
    for name in ("e1", "e2"):
        made.sent(name, 900)
        made.taken(name)
    return made


def test_everything_answered_once_is_clean(ledger: Ledger) -> None:
    for name in ("e1", "e2"):
        ledger.received(binary(decision(name, decision_id=f"d-{name}")), 1_100)
    totals = ledger.totals()
    assert (totals.events_in, totals.decisions_out, totals.lost, totals.duplicates) == (2, 2, 0, 0)
    assert (totals.faults, totals.redelivered, ledger.outstanding()) == ((), 0, 0)
    assert (totals.p50_ms, totals.end_to_end_p50_ms) == (5.0, 200)


def test_dropped_decision_is_noticed(ledger: Ledger) -> None:
    ledger.received(binary(decision("e1")), 1_100)
    assert ledger.totals().lost == 1
    assert ledger.outstanding() == 1


def test_second_decision_on_one_event_is_noticed(ledger: Ledger) -> None:
    ledger.received(binary(decision("e1", decision_id="by-v1")), 1_100)
    assert ledger.received(binary(decision("e1", decision_id="by-v2")), 1_200) is None
    totals = ledger.totals()
    assert (totals.duplicates, totals.redelivered, totals.decisions_out) == (1, 0, 1)


def test_redelivered_decision_is_told_from_a_second_one(ledger: Ledger) -> None:
    for at_ms in (1_100, 1_200, 1_300):
        ledger.received(binary(decision("e1")), at_ms)
    totals = ledger.totals()
    assert (totals.duplicates, totals.redelivered) == (0, 2)


def test_event_that_the_broker_never_took_is_not_lost(ledger: Ledger) -> None:
    ledger.sent("e3", 900)
    for name in ("e1", "e2"):
        ledger.received(binary(decision(name, decision_id=name)), 1_100)
    assert ledger.totals().lost == 0
    assert ledger.outstanding() == 1


def test_decision_that_overtakes_the_acknowledgement_counts(ledger: Ledger) -> None:
    ledger.sent("e3", 900)
    ledger.received(binary(decision("e3")), 1_000)
    ledger.taken("e3")
    assert ledger.totals().lost == 2


def test_decision_on_an_event_that_nobody_sent_is_noticed(ledger: Ledger) -> None:
    ledger.received(binary(decision("forged")), 1_100)
    totals = ledger.totals()
    assert totals.decisions_out == 0
    assert "nobody sent" in totals.faults[0]


@pytest.mark.parametrize("severity", ["medium", ""])
def test_answer_outside_the_schema_is_noticed(ledger: Ledger, severity: str) -> None:
    ledger.received(binary(decision("e1", severity=severity)), 1_100)
    assert "not an answer of the task" in ledger.totals().faults[0]


def test_missing_and_surplus_fields_are_noticed(ledger: Ledger) -> None:
    ledger.received(binary(decision("e1", decision={"urgency": 1})), 1_100)
    assert len(ledger.totals().faults) == 2


@pytest.mark.parametrize("message", [b"", b"\xff", b"[]", b"null", b"{}", b'{"specversion":"1.0"}'])
def test_message_that_is_no_decision_is_noticed(ledger: Ledger, message: bytes) -> None:
    assert ledger.received(message, 1_100) is None
    assert "not a decision" in ledger.totals().faults[0]


def test_structured_cloudevent_is_unwrapped(ledger: Ledger) -> None:
    wrapped = {"specversion": "1.0", "id": "d1", "data": json.loads(binary(decision("e1")))}
    assert ledger.received(json.dumps(wrapped).encode(), 1_100) == decision("e1")


def test_decisions_of_the_outage_are_told_by_the_nodes_own_clock(ledger: Ledger) -> None:
    ledger.received(binary(decision("e1", timestamp_ms=1_999)), 9_000)
    ledger.received(binary(decision("e2", decision_id="d2", timestamp_ms=2_000)), 9_000)
    assert [r.decision.event_id for r in ledger.decided_between(2_000, 3_000)] == ["e2"]


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 50) is None
    assert percentile([7.0], 95) == 7.0
    assert percentile([float(n) for n in range(1, 101)], 95) == 95.0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
