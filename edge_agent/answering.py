"""The agent's loop body: one event from the inbox becomes one decision in the outbox.

Events that wait may be answered together, where the model can and it pays. Each is still written by itself: what is
answered and not yet written lies in memory only, its event in the inbox.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from edge_agent.batching import BatchSize
from edge_agent.contract.event import Event, parse_event
from edge_agent.contract.messages import Decision, ModelRef, decision_id, now_ms
from edge_agent.contract.task import TaskSpec
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, RefusedError, TransientError
from edge_agent.log import get_logger
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.frames import LAST_FAULTS
from edge_agent.runtime.serving import ServingWorker
from edge_agent.settings import NodeSettings
from edge_agent.uplink.cloudevents import decision_message
from edge_agent.uplink.records import InboxEvent
from edge_agent.uplink.spool import Spool

_log = get_logger(__name__)
_MODEL_AREAS = ("worker.", "bundle.")
# The worker was lost over this very event; anything else that is transient is not the event's doing.
_LOST_WORKER = LAST_FAULTS | {"worker.died", "worker.stuck", "worker.protocol"}
_LATE = "worker.deadline"
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


class Escalation(Protocol):
    """What answers instead where the device is unsure."""

    def begin(self, row: InboxEvent, decision: Decision, task: TaskSpec) -> Decision | None:
        """Take the event over, where its task wants that.

        Returns:
            None when the event has left the inbox and waits for its answer elsewhere; else what to publish now.

        Raises:
            TransientError: the disk cannot take it: the event still waits in the inbox.
        """
        ...


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


_Outcome = tuple[Decision, TaskSpec | None] | EdgeError
"""What became of an event that was taken: a decision and the task that may escalate it (None: not worth asking), or the
fault that kept it from a decision."""


def _decided(row: InboxEvent, answer: Answer, model: ModelRef, task: TaskSpec) -> _Outcome:
    # Below a field's lowest floor the answer is not even a hint, and no escalation is spent on it.
    return decision_of(answer, row.task, row.event_id, model), None if answer.hopeless_fields else task


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
        escalation: takes over what the device is unsure of; None publishes the best guess.
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
        escalation: Escalation | None = None,
    ) -> None:
        self._spool = spool
        self._serving = serving
        self._node = node
        self._topics = topics
        self._on_probation = on_probation
        self._clock = clock
        self._batch_size = BatchSize()
        self._alone: set[int] = set()  # inbox ids of events that were late in company
        self._found: deque[tuple[InboxEvent, _Outcome]] = deque()
        self._escalation = escalation
        self._aside: dict[int, float] = {}  # inbox id -> when it comes back
        self._unwritten: tuple[InboxEvent, Decision, TaskSpec | None] | None = None
        self._waits_for: str | None = None

    def step(self) -> Step:
        """Write the answer to at most one event; others may be answered with it, and are written by the next steps.

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
        if not self._found:
            if not self._serving.ready:
                return Step.BLOCKED
            row = self._spool.next_event()
            if row is None:
                return Step.IDLE
            self._found.extend(self._ask(row))
            if not self._found:
                return Step.BLOCKED
        row, outcome = self._found.popleft()
        try:
            return self._unanswered(row, outcome) if isinstance(outcome, EdgeError) else self._publish(row, *outcome)
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

    def _ask(self, row: InboxEvent) -> list[tuple[InboxEvent, _Outcome]]:
        """What the model says of an event, and of those that it is answered together with."""
        model = self._serving.model
        if model is None or row.task not in model.tasks:
            return [(row, RefusedError("task.unknown", f"no task {row.task!r} in the active bundle"))]
        task = model.tasks[row.task]
        rows = [row, *self._others(row, task.deadline_ms / 1000)]
        asked: list[tuple[InboxEvent, Event]] = []
        found: list[tuple[InboxEvent, _Outcome]] = []
        for one in rows:
            try:
                asked.append((one, parse_event(one.payload, max_bytes=task.limits.max_event_bytes)))
            except EdgeError as error:
                found.append((one, error))
        if len(asked) == 1:
            return [(asked[0][0], self._ask_one(*asked[0], task)), *found]
        return [*self._ask_many(asked, task), *found] if asked else found

    def _others(self, row: InboxEvent, deadline_s: float) -> list[InboxEvent]:
        """Events to answer together with one, leased."""
        if row.inbox_id in self._alone or row.attempts:
            return []
        most = self._serving.together
        others = self._spool.next_alike(row, most - 1) if most > 1 else []
        size = self._batch_size.choose(1 + len(others), most, deadline_s)
        taken = [one for one in others[: size - 1] if one.inbox_id not in self._alone]
        for one in others:
            if one not in taken:
                self._spool.release(one.inbox_id)
        return taken

    def _ask_one(self, row: InboxEvent, event: Event, task: TaskSpec) -> _Outcome:
        began_s = self._clock()
        self._alone.discard(row.inbox_id)  # what it costs from now on, it alone is to blame for
        try:
            answer, model = self._serving.decide(row.task, event, task.deadline_ms / 1000)
        except EdgeError as error:
            return error
        self._batch_size.learn(1, self._clock() - began_s)
        return _decided(row, answer, model, task)

    def _ask_many(self, asked: Sequence[tuple[InboxEvent, Event]], task: TaskSpec) -> list[tuple[InboxEvent, _Outcome]]:
        began_s = self._clock()
        rows, events = [row for row, _ in asked], [event for _, event in asked]
        try:
            answers, model = self._serving.decide_many(task.name, events, task.deadline_ms / 1000)
        except EdgeError as error:
            if error.code == _NOT_READY or self._on_probation():
                return [(row, error) for row in rows]
            # Any of them may be to blame. An event that cost a worker is tried alone, and then it shows which it was.
            for row in rows:
                self._spool.worker_died(row.inbox_id, error)
            _log.error("worker_lost", events=len(rows), buried=False, error=error)
            return []
        self._batch_size.learn(len(rows), self._clock() - began_s)
        found: list[tuple[InboxEvent, _Outcome]] = []
        for row, one in zip(rows, answers, strict=True):
            if not isinstance(one, EdgeError):
                found.append((row, _decided(row, one, model, task)))
            elif one.code == _LATE:
                # Another may have used up the time of all: it gets its own.
                self._alone.add(row.inbox_id)
                self._spool.release(row.inbox_id)
            else:
                found.append((row, one))
        return found

    def _publish(self, row: InboxEvent, decision: Decision, asked_by: TaskSpec | None) -> Step:
        # Kept until it is written: on a full disk the same decision is tried again, and nothing is inferred anew.
        self._unwritten = (row, decision, asked_by)
        final: Decision | None = decision
        if self._escalation is not None and asked_by is not None:
            final = self._escalation.begin(row, decision, asked_by)
        if final is not None:
            message = decision_message(final, self._node.decision_topic_for(row.task), self._topics)
            if final.escalation is None:
                self._spool.complete(row.inbox_id, [message])
            else:
                self._spool.escalations.give_up(row.inbox_id, message, final.escalation.outcome)
        self._unwritten = None
        _log.info(
            "decided" if final is not None else "escalated",
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
            buried = self._spool.worker_died(row.inbox_id, error)
            _log.error("worker_lost", event_id=row.event_id, buried=buried, error=error)
            return Step.BURIED if buried else Step.BLOCKED
        if isinstance(error, TransientError):
            raise error
        self._spool.bury(row.inbox_id, error)
        _log.warning("event_buried", event_id=row.event_id, task=row.task, error=error)
        return Step.BURIED
