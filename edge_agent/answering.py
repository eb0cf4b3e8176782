"""The agent's loop body: one event from the inbox becomes one decision in the outbox."""

from __future__ import annotations

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
_LOST_WORKER = frozenset({"worker.died", "worker.stuck", "worker.out_of_memory"})


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
            fault and not the event's: the event waits for the verdict, which comes soon, and for the better model.
    """

    def __init__(
        self,
        spool: Spool,
        serving: ServingWorker,
        node: NodeSettings,
        topics: NodeTopics,
        on_probation: Callable[[], bool],
    ) -> None:
        self._spool = spool
        self._serving = serving
        self._node = node
        self._topics = topics
        self._on_probation = on_probation

    def step(self) -> Step:
        """Answer at most one event.

        Returns:
            IDLE when the inbox is empty; BLOCKED when something that cures itself stands in the way (no model, a
            worker's backoff, a full disk): the event waits.
        """
        if not self._serving.ready:
            return Step.BLOCKED
        try:
            row = self._spool.next_event()
        except TransientError as error:
            _log.error("inbox_unreadable", error=error)
            return Step.BLOCKED
        if row is None:
            return Step.IDLE
        try:
            return self._answer(row)
        except TransientError as error:
            # A disk that is full, say: the event keeps its place and no acknowledgement is taken back.
            self._spool.release(row.inbox_id)
            _log.error("event_waits", event_id=row.event_id, error=error)
            return Step.BLOCKED

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
        self._publish(row, decision_of(answer, row.task, row.event_id, model_ref))
        return Step.ANSWERED

    def _publish(self, row: InboxEvent, decision: Decision) -> None:
        message = decision_message(decision, self._node.decision_topic_for(row.task), self._topics)
        self._spool.complete(row.inbox_id, [message])
        _log.info(
            "decided",
            event_id=row.event_id,
            decision_id=decision.decision_id,
            task=row.task,
            route=decision.route,
            latency_ms=decision.latency_ms,
            guards=decision.guards or None,
        )

    def _unanswered(self, row: InboxEvent, error: EdgeError) -> Step:
        """Retry, count or bury, by whose fault it was: the event's, the model's, or nobody's."""
        if error.code.startswith(_MODEL_AREAS) and self._on_probation():
            self._spool.release(row.inbox_id)
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
