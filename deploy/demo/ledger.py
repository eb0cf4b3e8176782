"""The demo's bookkeeping: which events went in, which decisions came out, and what does not add up.

Everything the closing table claims is counted here, from what was really published and really received. A demo that
cannot fail proves nothing, so each fault (a lost, a doubled, an invalid, a foreign decision) has a test that plants it.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from edge_agent.contract.messages import Decision
from edge_agent.contract.task import TaskSpec

MAX_FAULTS = 20


@dataclass(frozen=True)
class Received:
    """A first-seen decision.

    Args:
        decision: its data.
        at_ms: wall clock at arrival.
        end_to_end_ms: from the moment the plant sent the event.
    """

    decision: Decision
    at_ms: int
    end_to_end_ms: float


@dataclass(frozen=True)
class Totals:
    """What can be said at this moment.

    Args:
        events_in: events that the broker has taken from the plant.
        decisions_out: events with a decision.
        lost: events that the broker took and nobody answered.
        duplicates: events answered by more than one decision.
        redelivered: the same decision again (same id). QoS 1 permits that after a cut, and consumers drop it by id.
        faults: what was invalid or foreign, in words.
        p50_ms, p95_ms: decision latency on the node; None before the first decision.
        end_to_end_p50_ms, end_to_end_p95_ms: from the plant's sending to the consumer's receipt.
    """

    events_in: int
    decisions_out: int
    lost: int
    duplicates: int
    redelivered: int
    faults: tuple[str, ...]
    p50_ms: float | None
    p95_ms: float | None
    end_to_end_p50_ms: float | None
    end_to_end_p95_ms: float | None


class Ledger:
    """Counts, from several threads.

    Args:
        task: the task that every decision must be a valid answer of.
    """

    def __init__(self, task: TaskSpec) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._sent_ms: dict[str, float] = {}
        self._taken: set[str] = set()
        self._received: dict[str, Received] = {}
        self._decision_ids: dict[str, set[str]] = {}
        self._redelivered = 0
        self._faults: list[str] = []

    def sent(self, event_id: str, at_ms: float) -> None:
        """The plant hands an event to its MQTT client."""
        with self._lock:
            self._sent_ms[event_id] = at_ms

    def taken(self, event_id: str) -> None:
        """The broker has acknowledged the event: from here on it must not be lost."""
        with self._lock:
            self._taken.add(event_id)

    def received(self, message: bytes, at_ms: int) -> Decision | None:
        """A message on a decision topic.

        Args:
            message: CloudEvents data (binary mode) or a structured CloudEvent.
            at_ms: wall clock at arrival.

        Returns:
            The decision when it is valid and new, else None.
        """
        with self._lock:
            try:
                decision = Decision.model_validate(_data_of(message))
            except (ValueError, ValidationError) as error:
                self._fault(f"not a decision: {str(error).splitlines()[0]}")
                return None
            for problem in self._task.check_decision(decision.decision):
                self._fault(f"decision on {decision.event_id} is not an answer of the task: {problem}")
            if decision.event_id not in self._sent_ms:
                self._fault(f"decision on {decision.event_id}, an event that nobody sent")
                return None
            known = self._decision_ids.setdefault(decision.event_id, set())
            if decision.decision_id in known:
                self._redelivered += 1
                return None
            known.add(decision.decision_id)
            if len(known) > 1:
                return None
            elapsed_ms = at_ms - self._sent_ms[decision.event_id]
            self._received[decision.event_id] = Received(decision, at_ms, elapsed_ms)
            return decision

    def fault(self, what: str) -> None:
        """Note something invalid that is no decision."""
        with self._lock:
            self._fault(what)

    def totals(self) -> Totals:
        """Everything up to now."""
        with self._lock:
            got = list(self._received.values())
            latencies = [r.decision.latency_ms for r in got]
            journeys = [r.end_to_end_ms for r in got]
            return Totals(
                events_in=len(self._taken),
                decisions_out=len(self._received),
                lost=len(self._taken - self._received.keys()),
                duplicates=sum(len(ids) > 1 for ids in self._decision_ids.values()),
                redelivered=self._redelivered,
                faults=tuple(self._faults[:MAX_FAULTS]),
                p50_ms=percentile(latencies, 50),
                p95_ms=percentile(latencies, 95),
                end_to_end_p50_ms=percentile(journeys, 50),
                end_to_end_p95_ms=percentile(journeys, 95),
            )

    def outstanding(self) -> int:
        """Events sent and not yet answered."""
        with self._lock:
            return len(self._sent_ms) - len(self._received)

    def decided_between(self, start_ms: int, end_ms: int) -> list[Received]:
        """Decisions that the node made in a span of wall-clock time (by its own timestamps)."""
        with self._lock:
            return [r for r in self._received.values() if start_ms <= r.decision.timestamp_ms < end_ms]

    def routes(self) -> dict[str, int]:
        """How many decisions took which route."""
        with self._lock:
            return dict(Counter(r.decision.route for r in self._received.values()))

    def models(self) -> dict[str, int]:
        """How many decisions each model version made."""
        with self._lock:
            return dict(Counter(r.decision.model.version for r in self._received.values()))

    def _fault(self, what: str) -> None:
        self._faults.append(what)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def _data_of(message: bytes) -> Any:
    """The decision inside a message: structured CloudEvents (MQTT 3.1.1) wrap it, binary ones (MQTT 5) are it."""
    parsed = json.loads(message)
    if isinstance(parsed, dict) and "specversion" in parsed:
        return parsed.get("data")
    return parsed
