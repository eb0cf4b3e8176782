"""The agent's loop body: one event from the inbox becomes one decision in the outbox."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from edge_agent.contract.event import parse_event
from edge_agent.contract.messages import Decision, ModelRef, decision_id, now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, RefusedError, TransientError
from edge_agent.log import get_logger
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.serving import ServingWorker
from edge_agent.settings import NodeSettings
from edge_agent.uplink.cloudevents import decision_message
from edge_agent.uplink.records import InboxEvent
from edge_agent.uplink.spool import Spool

_log = get_logger(__name__)
_MODEL_AREAS = ("worker.", "bundle.")
# The worker was lost over this very event; anything else that is transient is not the event's doing.
_LOST_WORKER = frozenset({"worker.died", "worker.stuck", "worker.protocol", "worker.out_of_memory"})
# No worker has seen the event.
_NOT_READY = "worker.not_ready"
# How long an event that a candidate could not answer stands aside before the candidate sees it again.
ASIDE_S = 1.0


class Step(Enum):
    """What one turn of the loop did."""

    ANSWERED = "answered"
    BURIED = "buried"
    IDLE = "idle"
    BLOCKED = "blocked"


def decision_of(answer: Answer, task: str, event_id: str, model: ModelRef) -> Decision:
    """The published form of an answer."""
    return Decision(
        decision_id=decision_id(task, event_id, model.digest),
        event_id=event_id,
        task=task,
        model=model,
        decision=answer.decision,
        confidence={name: round(p, 4) for name, p in answer.confidence.items()},
        route=answer.route,
        unsure_fields=answer.unsure_fields,
        guards=answer.guards,
        truncated=answer.truncated,
        specialist=answer.specialist,
        vetoed=answer.vetoed,
        latency_ms=round(answer.latency_ms, 2),
        timestamp_ms=now_ms(),
    )


class Answering:
    """Takes events by priority, has them answered, and swaps each for its decision in one transaction.

    Args:
        spool: inbox and outbox.
        serving: the worker that answers.
        node: names the decision topic.
        topics: names the source of the decisions.
        on_probation: whether the model that answers has yet to prove itself. What it cannot answer is then its own
            fault and not the event's: the event stands aside, so that others are answered, and comes back until there
            is a verdict. Every attempt counts against the candidate, so the verdict comes soon.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        spool: Spool,
        serving: ServingWorker,
        node: NodeSettings,
        topics: NodeTopics,
        on_probation: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool = spool
        self._serving = serving
        self._node = node
        self._topics = topics
        self._on_probation = on_probation
        self._clock = clock
        self._aside: dict[int, float] = {}  # inbox id -> when it comes back
        self._unwritten: tuple[InboxEvent, Decision] | None = None
        self._waits_for: str | None = None

    def step(self) -> Step:
        """Answer at most one event.

        Returns:
            IDLE when the inbox is empty; BLOCKED when something that cures itself stands in the way (no model, a
            worker's backoff, a full disk): the event waits.
        """
        try:
            step = self._step()
        except TransientError as error:
            if error.code != self._waits_for:  # told once, not ten times a second
                _log.error("events_wait", error=error)
            self._waits_for = error.code
            return Step.BLOCKED
        if step is Step.ANSWERED:
            self._waits_for = None
        return step

    def _step(self) -> Step:
        if self._unwritten is not None:
            return self._publish(*self._unwritten)
        self._end_leases()
        if not self._serving.ready:
            return Step.BLOCKED
        row = self._spool.next_event()
        if row is None:
            return Step.IDLE
        try:
            return self._answer(row)
        except TransientError:
            # The event keeps its place, and no acknowledgement is taken back.
            if self._unwritten is None:
                self._spool.release(row.inbox_id)
            raise

    def _end_leases(self) -> None:
        """Let events that stood aside be taken again: when their pause is over, or the candidate's time is."""
        if self._aside:
            now, unproven = self._clock(), self._on_probation()
            for inbox_id in [i for i, until in self._aside.items() if now >= until or not unproven]:
                del self._aside[inbox_id]
                self._spool.release(inbox_id)

    def _answer(self, row: InboxEvent) -> Step:
        model = self._serving.model
        try:
            if model is None or row.task not in model.tasks:
                raise RefusedError("task.unknown", f"no task {row.task!r} in the active bundle")
            task = model.tasks[row.task]
            event = parse_event(row.payload, max_bytes=task.limits.max_event_bytes)
            answer, model_ref = self._serving.decide(row.task, event, task.deadline_ms / 1000)
        except EdgeError as error:
            return self._unanswered(row, error)
        return self._publish(row, decision_of(answer, row.task, row.event_id, model_ref))

    def _publish(self, row: InboxEvent, decision: Decision) -> Step:
        # Kept until it is written: on a full disk the same decision is tried again, and nothing is inferred anew.
        self._unwritten = (row, decision)
        message = decision_message(decision, self._node.decision_topic_for(row.task), self._topics)
        self._spool.complete(row.inbox_id, [message])
        self._unwritten = None
        _log.info(
            "decided",
            event_id=row.event_id,
            decision_id=decision.decision_id,
            task=row.task,
            route=decision.route,
            latency_ms=decision.latency_ms,
            guards=decision.guards or None,
            specialist=decision.specialist,
            vetoed=decision.vetoed,
        )
        return Step.ANSWERED

    def _unanswered(self, row: InboxEvent, error: EdgeError) -> Step:
        """Retry, count or bury, by whose fault it was: the event's, the model's, or nobody's."""
        if error.code == _NOT_READY:
            raise error
        if error.code.startswith(_MODEL_AREAS) and self._on_probation():
            self._aside[row.inbox_id] = self._clock() + ASIDE_S
            _log.warning("candidate_failed", event_id=row.event_id, error=error)
            return Step.BLOCKED
        if error.code in _LOST_WORKER:
            buried = self._spool.worker_died(row.inbox_id)
            _log.error("worker_lost", event_id=row.event_id, buried=buried, error=error)
            return Step.BURIED if buried else Step.BLOCKED
        if isinstance(error, TransientError):
            raise error
        self._spool.bury(row.inbox_id, error)
        _log.warning("event_buried", event_id=row.event_id, task=row.task, error=error)
        return Step.BURIED
