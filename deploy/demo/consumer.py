"""The simulated MES: subscribes to decisions, and to what the node says about itself."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import paho.mqtt.client as paho
from pydantic import ValidationError

from deploy.demo.ledger import Ledger
from edge_agent.contract.messages import DeadLetter, Decision, ModelRef, QueueTelemetry, Reported, Status, UpdateState
from edge_agent.contract.topics import NodeTopics

_LAST_DECISIONS = 6


@dataclass
class History:
    """The states that one revision of the desired state went through.

    Args:
        states: in order, repeats left out.
        last: the latest report.
    """

    states: list[UpdateState] = field(default_factory=list)
    last: Reported | None = None


class Consumer:
    """Receives on paho's thread, works on its own: a callback that raises would end the network thread.

    Args:
        client: connected.
        node: whose topics to watch.
        decisions: topic of the decisions.
        ledger: told of every decision.
        clock_ms: wall clock.
    """

    def __init__(
        self, client: paho.Client, node: NodeTopics, decisions: str, ledger: Ledger, clock_ms: Callable[[], float]
    ) -> None:
        self._node = node
        self._decisions = decisions
        self._ledger = ledger
        self._lock = threading.Lock()
        self._history: dict[int, History] = {}
        self._status: Status | None = None
        self._queue: QueueTelemetry | None = None
        self._active: ModelRef | None = None
        self._last: deque[Decision] = deque(maxlen=_LAST_DECISIONS)
        self._dead: list[DeadLetter] = []
        self._inbox: queue.SimpleQueue[tuple[str, bytes, int] | None] = queue.SimpleQueue()
        client.on_message = lambda _c, _u, m: self._inbox.put((m.topic, bytes(m.payload), int(clock_ms())))
        self._thread = threading.Thread(target=self._run, name="consumer", daemon=True)
        self._thread.start()
        watched = (decisions, node.status, node.model_reported, node.deadletter, node.tele("queue"))
        client.subscribe([(topic, 1) for topic in watched])

    def close(self) -> None:
        """Work off what has arrived, and end."""
        self._inbox.put(None)
        self._thread.join(timeout=10)

    def history(self, rev: int) -> History:
        """What the node reported about a revision so far."""
        with self._lock:
            found = self._history.get(rev, History())
            return History(list(found.states), found.last)

    @property
    def status(self) -> Status | None:
        """The latest birth or death certificate."""
        return self._status

    @property
    def queue(self) -> QueueTelemetry | None:
        """The latest queue depths; None until the node has sent some."""
        return self._queue

    @property
    def active(self) -> ModelRef | None:
        """The model that the node last reported as active."""
        return self._active

    def last_decisions(self) -> list[Decision]:
        """The newest few, oldest first."""
        with self._lock:
            return list(self._last)

    def dead_letters(self) -> list[DeadLetter]:
        """Events that the node gave up on."""
        with self._lock:
            return list(self._dead)

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            topic, payload, at_ms = item
            if topic == self._decisions:
                decision = self._ledger.received(payload, at_ms)
                if decision is not None:
                    with self._lock:
                        self._last.append(decision)
            elif payload:
                self._note(topic, payload)

    def _note(self, topic: str, payload: bytes) -> None:
        try:
            if topic == self._node.status:
                self._status = Status.model_validate_json(payload)
            elif topic == self._node.tele("queue"):
                self._queue = QueueTelemetry.model_validate_json(payload)
            elif topic == self._node.deadletter:
                letter = DeadLetter.model_validate_json(payload)
                with self._lock:
                    self._dead.append(letter)
            elif topic == self._node.model_reported:
                self._reported(Reported.model_validate_json(payload))
        except ValidationError as error:
            self._ledger.fault(f"{topic}: {str(error).splitlines()[0]}")

    def _reported(self, reported: Reported) -> None:
        self._active = reported.active
        if reported.rev is None:
            return
        with self._lock:
            history = self._history.setdefault(reported.rev, History())
            if not history.states or history.states[-1] != reported.state:
                history.states.append(reported.state)
            history.last = reported
