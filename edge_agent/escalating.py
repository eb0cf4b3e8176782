"""The escalator's ports, joined to the spool: which events are asked about, and where they wait meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_agent.contract.document import read_json, to_json
from edge_agent.contract.escalation import EscalationSpec
from edge_agent.contract.escalation_messages import Escalation, Outcome
from edge_agent.contract.event import Event, parse_event
from edge_agent.contract.messages import Decision, now_ms
from edge_agent.contract.task import TaskSpec
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.escalation.chat import endpoint_of
from edge_agent.escalation.clock import BootClock
from edge_agent.escalation.escalator import Escalator
from edge_agent.escalation.ports import Case, Clock
from edge_agent.escalation.question import mqtt_request
from edge_agent.escalation.rules import Budget, Moment, Waiting, refilled, refusal, spent
from edge_agent.log import get_logger
from edge_agent.settings import EscalationSettings, NodeSettings
from edge_agent.uplink.cloudevents import JSON, decision_message
from edge_agent.uplink.records import BudgetRow, EscalationRow, InboxEvent, NewEscalation, OutboundMessage
from edge_agent.uplink.spool import Spool
from edge_agent.uplink.spool_escalations import Begun

_log = get_logger(__name__)


class EscalationStore:
    """Implements `edge_agent.escalation.ports.Store` on the spool.

    Args:
        spool: where escalations wait and decisions go out.
        node: names the decision topic.
        topics: names the source of the decisions.
    """

    def __init__(self, spool: Spool, node: NodeSettings, topics: NodeTopics) -> None:
        self._spool = spool
        self._rows = spool.escalations
        self._node = node
        self._topics = topics

    def waiting(self) -> Sequence[Waiting]:
        """See `Store`."""
        return [_waiting(row) for row in self._rows.waiting()]

    def case(self, escalation_id: int) -> Case | None:
        """See `Store`."""
        found = self._rows.case(escalation_id)
        if found is None:
            return None
        try:
            guess = Decision.model_validate_json(found.guess)
            task = read_json(TaskSpec, found.spec)
            event = parse_event(found.payload, max_bytes=task.limits.max_event_bytes)
        except (ValueError, EdgeError) as error:
            self._bury(escalation_id, type(error).__name__)
            return None
        return Case(_waiting(found.row), guess, task, event)

    def find(self, task: str, decision_id: str) -> int | None:
        """See `Store`."""
        return self._rows.find(task, decision_id)

    def wait_anew(self, escalation_id: int, now: Moment) -> None:
        """See `Store`."""
        self._rows.begin_anew(escalation_id, now.boot_id, now.at_ms)

    def note_attempt(self, escalation_id: int) -> None:
        """See `Store`."""
        self._rows.note_attempt(escalation_id)

    def settle(self, escalation_id: int, decision: Decision) -> bool:
        """See `Store`."""
        outcome: Outcome = "failed" if decision.escalation is None else decision.escalation.outcome
        message = decision_message(decision, self._node.decision_topic_for(decision.task), self._topics)
        return self._rows.settle(escalation_id, message, outcome)

    def count(self, reason: str) -> None:
        """See `Store`."""
        self._spool.count(reason)

    def _bury(self, escalation_id: int, why: str) -> None:
        """What an agent of another version wrote, and this one cannot read, can still be decided anew by a person."""
        error = PermanentError("escalation.unreadable", f"a pending escalation cannot be read: {why}")
        with self._spool.batch():
            lost = self._rows.forget(escalation_id)
            if lost is not None:
                task, event_id, payload = lost
                self._spool.bury(None, error, task=task, event_id=event_id, payload=payload)
        _log.error("escalation_unreadable", error=error)


class Escalating:
    """Implements `edge_agent.answering.Escalation`.

    Args:
        spool: inbox, outbox and what lies between.
        settings: which ways the site has opened, and the bounds.
        node: names the decision topic.
        topics: this node's topics.
        on_fault: told of a fault of the server that needs a person, and of None when it is over.
        clock: time since the machine's start.

    Attributes:
        escalator: drives what was begun here to its end.
    """

    def __init__(
        self,
        spool: Spool,
        settings: EscalationSettings,
        node: NodeSettings,
        topics: NodeTopics,
        on_fault: Callable[[EdgeError | None], None],
        *,
        clock: Clock | None = None,
    ) -> None:
        self._rows = spool.escalations
        self._settings = settings
        self._topics = topics
        self._clock = clock or BootClock()
        store = EscalationStore(spool, node, topics)
        self.escalator = Escalator(settings, store, endpoint_of(settings), self._clock, on_fault)

    def begin(self, row: InboxEvent, decision: Decision, task: TaskSpec) -> Decision | None:
        """See `edge_agent.answering.Escalation`."""
        spec = task.escalation
        if spec is None or decision.route != "abstained":
            return decision
        event = parse_event(row.payload, max_bytes=task.limits.max_event_bytes)
        outcome = refusal(spec, is_open=self.escalator.is_open(spec.to), has_shared=bool(spec.shared(event)))
        if outcome is None:
            outcome = self._begin(row, decision, task, spec, event)
        if outcome is None:
            self.escalator.wake()
            return None
        return decision.model_copy(update={"escalation": Escalation(to=spec.to, outcome=outcome)})

    def _begin(
        self, row: InboxEvent, decision: Decision, task: TaskSpec, spec: EscalationSpec, event: Event
    ) -> Outcome | None:
        now = self._clock.now()
        left = self._rows.budget(row.task)
        earlier = None if left is None else Budget(left.credit, Moment(left.boot_id, left.at_ms))
        now_left = refilled(earlier, spec.budget_per_hour, now)
        budget = spent(now_left)
        if budget is None:
            if earlier is not None and earlier.since.boot_id != now.boot_id:
                # The refill counts from this start of the machine on, and so has to begin.
                self._rows.keep_budget(row.task, BudgetRow(now_left.credit, now.boot_id, now.at_ms))
            return "over_budget"
        timeout_s = min(spec.timeout_s, self._settings.timeout_max_s)
        request = None
        if spec.to == "mqtt":
            question = mqtt_request(task, event, decision, self._topics, timeout_s=timeout_s, now_ms=now_ms())
            topic = self._topics.escalation(row.task, decision.decision_id)
            # Of the class of alarms, because the sequence of decisions must show no gap where a question was sent.
            request = OutboundMessage(topic, question, klass="alarm", content_type=JSON)
        begun = self._rows.begin(
            row.inbox_id,
            NewEscalation(
                decision_id=decision.decision_id,
                destination=spec.to,
                guess=decision.model_dump_json().encode(),
                spec=to_json(task),
                boot_id=now.boot_id,
                begun_ms=now.at_ms,
                timeout_ms=round(timeout_s * 1000),
            ),
            BudgetRow(budget.credit, now.boot_id, now.at_ms),
            bounds=(self._settings.pending_max, self._settings.pending_max_bytes),
            request=request,
        )
        return "backlog_full" if begun is Begun.FULL else None


def _waiting(row: EscalationRow) -> Waiting:
    since = Moment(row.boot_id, row.begun_ms)
    return Waiting(row.escalation_id, row.destination, since, row.timeout_ms, row.power_cuts)
