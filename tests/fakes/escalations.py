"""A small task that escalates, its cases, and a store and a clock in memory: seams of the escalator."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from edge_agent.contract.document import read_document, to_document
from edge_agent.contract.event import Event
from edge_agent.contract.messages import Decision, ModelRef, decision_id
from edge_agent.contract.task import TaskSpec, parse_task
from edge_agent.errors import EdgeError
from edge_agent.escalation.ports import Case
from edge_agent.escalation.rules import Moment, Waiting

TASK_YAML = """\
name: triage
version: 3
description: Sort a machine event.
prompt:
  prefix: "Triage the factory event.\\n"
  event: [{field: text, label: text}, {field: code, label: code}]
output:
  type: object
  properties:
    severity: {enum: [low, medium, high]}
    stop: {type: boolean}
    minutes: {type: integer, minimum: 0, maximum: 60}
    note: {type: string, maxLength: 40}
thresholds: {severity: 0.9}
guards:
  - name: fire_is_high
    when: [{event: code, equals: FIRE}]
    then: {severity: {at_least: high}}
escalation: {to: http, timeout_s: 30, share: [text]}
"""
GOOD = {"severity": "medium", "stop": True, "minutes": 5, "note": "oil"}
GUESS = {"severity": "low", "stop": False, "minutes": 0, "note": ""}
EVENT: Event = {"id": "e-1", "text": "oil pressure low", "code": "E217", "operator": "Frau Secret"}


def task_of(**escalation: Any) -> TaskSpec:
    """The task, with some lines of its section `escalation` replaced; None removes one."""
    task = parse_task(TASK_YAML)
    assert task.escalation is not None
    fields = to_document(task)
    section = {**fields["escalation"], **escalation}
    return read_document(TaskSpec, {**fields, "escalation": {k: v for k, v in section.items() if v is not None}})


def guess_of(event_id: str = "e-1") -> Decision:
    model = ModelRef(name="small", version="1.0.0", digest="a" * 64)
    return Decision(
        decision_id=decision_id("triage", event_id, model.digest),
        event_id=event_id,
        task="triage",
        model=model,
        decision=GUESS,
        confidence=dict.fromkeys(GUESS, 0.5),
        route="abstained",
        unsure_fields=("severity",),
        latency_ms=5.0,
        timestamp_ms=1,
    )


def case_of(
    number: int = 1,
    *,
    task: TaskSpec | None = None,
    event: Event | None = None,
    since: Moment | None = None,
    timeout_ms: int = 30_000,
    power_cuts: int = 0,
) -> Case:
    spec = task or task_of()
    assert spec.escalation is not None
    waiting = Waiting(number, spec.escalation.to, since or Moment("boot-1", 0), timeout_ms, power_cuts)
    return Case(waiting, guess_of(f"e-{number}"), spec, event or EVENT)


class FakeClock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.moment = Moment("boot-1", 0)

    def now(self) -> Moment:
        return self.moment

    def pass_ms(self, ms: int) -> None:
        self.moment = Moment(self.moment.boot_id, self.moment.at_ms + ms)

    def power_cut(self) -> None:
        """The machine starts anew."""
        self.moment = Moment(self.moment.boot_id + "+", 0)


class MemoryStore:
    """Implements `ports.Store`; fails as ``fault`` says."""

    def __init__(self, *cases: Case) -> None:
        self.cases = {case.waiting.escalation_id: case for case in cases}
        self.published: list[Decision] = []
        self.attempts: Counter[int] = Counter()
        self.counted: Counter[str] = Counter()
        self.fault: EdgeError | None = None
        self._lock = threading.Lock()

    def waiting(self) -> list[Waiting]:
        with self._lock:
            return [case.waiting for case in self.cases.values()]

    def case(self, escalation_id: int) -> Case | None:
        return self.cases.get(escalation_id)

    def find(self, task: str, decision_id: str) -> int | None:
        found = [n for n, case in self.cases.items() if (case.task.name, case.guess.decision_id) == (task, decision_id)]
        return found[0] if found else None

    def wait_anew(self, escalation_id: int, now: Moment) -> None:
        case = self.cases[escalation_id]
        old = case.waiting
        waiting = Waiting(old.escalation_id, old.to, now, old.timeout_ms, old.power_cuts + 1)
        self.cases[escalation_id] = Case(waiting, case.guess, case.task, case.event)

    def note_attempt(self, escalation_id: int) -> None:
        self._fail()
        self.attempts[escalation_id] += 1

    def settle(self, escalation_id: int, decision: Decision) -> bool:
        self._fail()
        with self._lock:
            if self.cases.pop(escalation_id, None) is None:
                return False
            self.published.append(decision)
            return True

    def count(self, reason: str) -> None:
        self.counted[reason] += 1

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault
