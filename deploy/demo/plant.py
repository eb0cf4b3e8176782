"""The simulated plant: publishes events over MQTT QoS 1, at the pace of the present phase of its day."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import paho.mqtt.client as paho

from deploy.demo.events import EventStream, Mix
from deploy.demo.ledger import Ledger

_TICK_S = 0.02


@dataclass(frozen=True)
class Pace:
    """How the plant behaves in a phase.

    Args:
        mix: kind of events.
        per_s: events a second.
        backlog: publish at ``per_s`` only while fewer events than this are unanswered (0: no such limit). A flood is
            faster than any node; the limit keeps its size in proportion to the machine that the demo runs on.
    """

    mix: Mix
    per_s: float
    backlog: int = 0


QUIET = Pace("steady", 0.0)


class Plant:
    """Publishes on a thread of its own until closed.

    Args:
        client: connected; the plant sets its ``on_publish``.
        topic: where events go.
        ledger: told of every event sent and taken.
        clock_ms: wall clock.
    """

    def __init__(self, client: paho.Client, topic: str, ledger: Ledger, clock_ms: Callable[[], float]) -> None:
        self._client = client
        self._topic = topic
        self._ledger = ledger
        self._clock_ms = clock_ms
        self._events = EventStream()
        self._lock = threading.Lock()
        self._waiting: dict[int, str] = {}
        self._early: set[int] = set()
        self._pace = QUIET
        self._closed = threading.Event()
        client.on_publish = lambda _c, _u, mid, code, _p: None if code.is_failure else self._acknowledged(mid)
        self._thread = threading.Thread(target=self._run, name="plant", daemon=True)
        self._thread.start()

    def enter(self, pace: Pace) -> None:
        """Change the pace."""
        self._pace = pace

    def close(self) -> None:
        """Stop publishing."""
        self._closed.set()
        self._thread.join(timeout=10)

    def unacknowledged(self) -> int:
        """Events that the broker has not taken yet."""
        with self._lock:
            return len(self._waiting)

    def _run(self) -> None:
        due = 0.0
        before = time.monotonic()
        while not self._closed.wait(_TICK_S):
            pace, now = self._pace, time.monotonic()
            # At most half a second's worth is caught up after a stall, else a slow tick would fake a flood.
            due = min(due + pace.per_s * (now - before), max(1.0, pace.per_s / 2))
            before = now
            while due >= 1 and not self._closed.is_set():
                if pace.backlog and self._ledger.outstanding() >= pace.backlog:
                    due = 0.0
                    break
                due -= 1
                self._publish(pace.mix)

    def _publish(self, mix: Mix) -> None:
        event = self._events.next(mix)
        event_id = str(event["id"])
        self._ledger.sent(event_id, self._clock_ms())
        mid = self._client.publish(self._topic, json.dumps(event).encode(), qos=1).mid
        with self._lock:
            # The acknowledgement may have overtaken us.
            if mid in self._early:
                self._early.discard(mid)
                self._ledger.taken(event_id)
            else:
                self._waiting[mid] = event_id

    def _acknowledged(self, mid: int) -> None:
        with self._lock:
            event_id = self._waiting.pop(mid, None)
            if event_id is None:
                self._early.add(mid)
                return
        self._ledger.taken(event_id)
