"""Takes messages from a connection to the ports, and acknowledges what is durable.

Rules:
- Messages are taken in batches; one commit makes a batch durable; only then are its messages acknowledged, in the
  order of their arrival (MQTT 5.0 section 4.6).
- A full disk or a busy spool holds the whole batch, unacknowledged, until it passes or the connection is lost (then
  the broker sends the batch again).
- A full inbox sheds: the refused event becomes the dead letter ``inbox.full`` and is acknowledged. Holding it back
  would fill the receive window with events of the lowest lane and keep safety events out.
- Whatever one message does, the next one is taken: a fault in a port buries that one event.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from paho.mqtt.client import topic_matches_sub

from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, PermanentError, RefusedError, TransientError
from edge_agent.log import get_logger
from edge_agent.uplink.connection import Connection, Incoming
from edge_agent.uplink.ports import UplinkPorts
from edge_agent.uplink.spool import Spool

BATCH_MAX = 100
# How soon the intake sees a stop or a new connection; an idle node wakes up for it this often.
POLL_S = 0.5
RETRY_S = 0.5
_log = get_logger(__name__)


class Intake:
    """The incoming side of one uplink; everything here runs on one thread.

    Args:
        spool: where a batch is committed and refused events are buried.
        ports: what takes events and desired states.
        topics: names the event topics of this node.
        sources: further topic filters and the task of their messages.
        max_payload_bytes: larger payloads are buried without their content.
    """

    def __init__(
        self, spool: Spool, ports: UplinkPorts, topics: NodeTopics, sources: Mapping[str, str], max_payload_bytes: int
    ) -> None:
        self._spool = spool
        self._ports = ports
        self._topics = topics
        self._sources = dict(sources)
        self._max_payload_bytes = max_payload_bytes
        self._last_hold: str | None = None
        self._overflowed = 0

    def step(self, connection: Connection, stop: threading.Event) -> None:
        """Take the messages that are there, or wait a moment for the first."""
        batch = self._gather(connection)
        if connection.overflowed != self._overflowed:
            self._spool.count("event.overflow", max(0, connection.overflowed - self._overflowed))
            self._overflowed = connection.overflowed
        while batch and connection.is_alive and not stop.is_set():
            try:
                with self._spool.batch():
                    for message in batch:
                        self._take(message)
            except EdgeError as error:
                # Not acknowledged. What this connection brought dies with it; the broker has kept it.
                self._note_hold(error)
                stop.wait(RETRY_S)
                continue
            self._note_hold(None)
            for message in batch:
                connection.ack(message)
            return

    def begin(self) -> None:
        """Start over on a new connection."""
        self._overflowed = 0

    def _gather(self, connection: Connection) -> list[Incoming]:
        batch: list[Incoming] = []
        try:
            batch.append(connection.incoming.get(timeout=POLL_S))
            while len(batch) < BATCH_MAX:
                batch.append(connection.incoming.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _take(self, message: Incoming) -> None:
        if message.topic == self._topics.model_desired:
            self._guard(lambda: self._ports.on_desired(message.payload), message, task=None)
            return
        answered = None if message.topic is None else self._topics.answered(message.topic)
        if answered is not None:
            self._take_answer(*answered, message)
            return
        task = None if message.topic is None else self._task_of(message.topic)
        if task is None:
            self._spool.count("message.unknown_topic")
        elif message.retain:
            # Retained on an event topic: a replay of something old, delivered anew at every subscription.
            self._spool.count("event.retained")
        elif len(message.payload) > self._max_payload_bytes:
            detail = f"event of {len(message.payload)} bytes exceeds {self._max_payload_bytes}"
            self._bury(RefusedError("event.too_large", detail), message, task)
        else:
            self._guard(lambda: self._ports.on_event(task, message.payload), message, task=task)

    def _take_answer(self, task: str, decision_id: str, message: Incoming) -> None:
        if message.retain:
            # It would come anew with every subscription; the question that it belonged to is long settled.
            self._spool.count("escalation.answer_retained")
            return
        try:
            self._ports.on_escalation_answer(task, decision_id, message.payload)
        except EdgeError as error:
            if isinstance(error, TransientError) or error.code.startswith(("spool.", "disk.")):
                raise
            _log.warning("escalation_answer_refused", decision_id=decision_id, error=error)
        except Exception:  # noqa: BLE001 - a defect in a port costs one answer, not the intake
            _log.exception("port_failed", topic=message.topic)

    def _guard(self, call: Callable[[], object], message: Incoming, *, task: str | None) -> None:
        try:
            call()
        except RefusedError as error:
            _log.info("event_refused", error=error, task=task)
        except TransientError as error:
            if error.code != "inbox.full":
                raise
            self._bury(error, message, task)
        except EdgeError as error:
            if error.code.startswith(("spool.", "disk.")):
                raise
            self._bury(error, message, task)
        except Exception as error:  # noqa: BLE001 - a defect in a port costs one event, not the intake
            _log.exception("port_failed", topic=message.topic)
            self._bury(PermanentError("event.intake_failed", f"{type(error).__name__}: {error}"), message, task)

    def _bury(self, error: EdgeError, message: Incoming, task: str | None) -> None:
        self._spool.bury(None, error, task=task or message.topic, payload=message.payload)

    def _task_of(self, topic: str) -> str | None:
        task = self._topics.task_of(topic)
        if task is not None:
            return task
        return next((task for name, task in self._sources.items() if topic_matches_sub(name, topic)), None)

    def _note_hold(self, error: EdgeError | None) -> None:
        code = None if error is None else error.code
        if code != self._last_hold:
            if error is not None:
                _log.error("intake_held", error=error)
            else:
                _log.info("intake_resumed", after=self._last_hold)
            self._last_hold = code
