"""Sends what waits: retained state first, then the outbox in the order in which it was queued.

Rules:
- At most ``min(max_inflight, the broker's Receive Maximum)`` messages are unacknowledged. paho would hand over more.
- An outbox row is deleted on a PUBACK with a good reason code and on nothing else.
- A retryable reason (quota, busy) pauses the drain; a final one (not authorised, topic refused) buries the message.
- Sending is limited to ``drain_per_s``, so that a long outage does not end in a burst that starves live traffic.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge_agent.errors import EdgeError, PermanentError, TransientError
from edge_agent.log import get_logger
from edge_agent.uplink import faults
from edge_agent.uplink.cloudevents import JSON, WireMessage, render
from edge_agent.uplink.connection import Connack, Puback
from edge_agent.uplink.records import QueuedMessage
from edge_agent.uplink.spool import Spool

PAUSE_FIRST_S = 1.0
PAUSE_MAX_S = 60.0
EXPIRE_EVERY_S = 60.0
# Fixed header, topic and property lengths, packet id; the properties are counted in full below.
PACKET_OVERHEAD_BYTES = 64
_log = get_logger(__name__)


class Outlet(Protocol):
    """What the drain needs of a connection."""

    @property
    def pubacks(self) -> queue.SimpleQueue[Puback]:
        """Answers that have not been settled yet."""

    def publish(self, wire: WireMessage, *, qos: int, retain: bool, expiry_s: int | None = None) -> int:
        """Send, and return the packet id (see `Connection.publish`)."""


@dataclass(frozen=True, slots=True)
class _Retained:
    topic: str
    payload: bytes


class Drain:
    """The outgoing side of one uplink. ``offer`` may be called from any thread, the rest from one.

    Args:
        spool: the outbox.
        rate_per_s: messages per second at most.
        max_inflight: our own bound of unacknowledged messages.
        clock: monotonic seconds; another one in tests.
    """

    def __init__(
        self, spool: Spool, rate_per_s: float, max_inflight: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._spool = spool
        self._rate_per_s = rate_per_s
        self._max_inflight = max_inflight
        self._lock = threading.Lock()
        # Latest value per topic: a state that was overtaken before it could be sent is of no use to anyone.
        self._retained: dict[str, _Retained] = {}
        self._acked: set[int] = set()
        self._next_expiry = 0.0
        self._start(max_inflight, None, is_v5=True)

    def _start(self, window: int, max_packet_bytes: int | None, *, is_v5: bool) -> None:
        self._window = window
        self._max_packet_bytes = max_packet_bytes
        self._is_v5 = is_v5
        self._inflight: dict[int, QueuedMessage | _Retained] = {}
        self._after_seq = 0
        self._allowance = float(window)
        self._allowed_at = self._clock()
        self._paused_until = 0.0
        self._pause_s = PAUSE_FIRST_S

    def begin(self, connack: Connack) -> None:
        """Start over on a new connection: whatever was not acknowledged is sent again."""
        window = min(self._max_inflight, connack.receive_maximum)
        self._start(window, connack.max_packet_bytes, is_v5=connack.is_v5)

    def offer(self, topic: str, payload: bytes) -> None:
        """Set the retained state of ``topic``; survives reconnects, not restarts."""
        with self._lock:
            self._retained[topic] = _Retained(topic, payload)
        self._spool.outbox_changed.set()

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing is unacknowledged."""
        with self._lock:
            return not (self._retained or self._inflight or self._acked or self._spool.pending(1))

    def step(self, connection: Outlet) -> float:
        """Settle the PUBACKs that came, then send what may be sent.

        Returns:
            Seconds after which to call again, if nothing wakes the caller before.

        Raises:
            TransientError: ``mqtt.connection_lost``.
        """
        self._settle(connection)
        now = self._clock()
        if now >= self._next_expiry:
            self._next_expiry = now + EXPIRE_EVERY_S
            self._guarded(self._spool.expire)
        self._send_retained(connection)
        if now < self._paused_until:
            return self._paused_until - now
        return self._send_outbox(connection, now)

    # ---- PUBACKs

    def _settle(self, connection: Outlet) -> None:
        while not connection.pubacks.empty():
            puback = connection.pubacks.get_nowait()
            sent = self._inflight.pop(puback.mid, None)
            if isinstance(sent, _Retained):
                self._settle_retained(sent, puback)
            elif sent is not None:
                self._settle_queued(sent, puback)
        if self._acked and self._guarded(lambda: self._spool.delete(self._acked)):
            self._acked.clear()

    def _settle_retained(self, sent: _Retained, puback: Puback) -> None:
        verdict = faults.judge(puback.reason)
        if verdict is faults.Verdict.RETRY:
            self._pause()
            return
        with self._lock:
            if self._retained.get(sent.topic) is sent:
                del self._retained[sent.topic]
        if verdict is faults.Verdict.BURY:
            error = faults.not_taken(puback.reason, sent.topic)
            self._spool.count(error.code)
            _log.error("publish_refused", error=error)

    def _settle_queued(self, sent: QueuedMessage, puback: Puback) -> None:
        verdict = faults.judge(puback.reason)
        if verdict is faults.Verdict.DELIVERED:
            self._acked.add(sent.seq)
            self._pause_s = PAUSE_FIRST_S
            return
        error = faults.not_taken(puback.reason, sent.message.topic)
        if verdict is faults.Verdict.RETRY:
            _log.warning("publish_postponed", error=error, pause_s=self._pause_s)
            # Rows after this one that are on their way stay in flight; the search merely starts here again.
            self._after_seq = min(self._after_seq, sent.seq - 1)
            self._pause()
        else:
            self._bury(sent.seq, error)

    def _pause(self) -> None:
        self._paused_until = self._clock() + random.uniform(self._pause_s / 2, self._pause_s)  # noqa: S311 - jitter
        self._pause_s = min(self._pause_s * 2, PAUSE_MAX_S)

    def _bury(self, seq: int, error: EdgeError) -> None:
        _log.error("publish_refused", error=error)
        self._guarded(lambda: self._spool.drop(seq, error))

    # ---- sending

    def _send_retained(self, connection: Outlet) -> None:
        with self._lock:
            sent = {id(item) for item in self._inflight.values()}
            waiting = [item for item in self._retained.values() if id(item) not in sent]
        for item in waiting:
            if len(self._inflight) >= self._window:
                return
            wire = WireMessage(item.topic, item.payload, JSON if item.payload else None, ())
            self._inflight[connection.publish(wire, qos=1, retain=True)] = item

    def _send_outbox(self, connection: Outlet, now: float) -> float:
        self._allowance = min(self._window, self._allowance + (now - self._allowed_at) * self._rate_per_s)
        self._allowed_at = now
        room = min(self._window - len(self._inflight), int(self._allowance))
        if room <= 0:
            return 1 / self._rate_per_s if self._allowance < 1 else 1.0
        waiting: list[QueuedMessage] = []
        try:
            waiting = self._spool.pending(room, after_seq=self._after_seq)
        except EdgeError as error:
            _log.warning("outbox_unreadable", error=error)
        unsettled = {item.seq for item in self._inflight.values() if isinstance(item, QueuedMessage)} | self._acked
        for queued in waiting:
            if queued.seq not in unsettled:
                self._send_queued(connection, queued)
            self._after_seq = queued.seq
        return 0.0 if len(waiting) == room else 1.0

    def _send_queued(self, connection: Outlet, queued: QueuedMessage) -> None:
        wire = render(queued.message, queued.class_seq, is_v5=self._is_v5)
        size_bytes = _packet_bytes(wire)
        if self._max_packet_bytes is not None and size_bytes > self._max_packet_bytes:
            detail = f"{size_bytes} bytes exceed the broker's limit of {self._max_packet_bytes}"
            self._bury(queued.seq, PermanentError("mqtt.packet_too_large", detail))
            return
        try:
            mid = connection.publish(wire, qos=queued.message.qos, retain=queued.message.retain)
        except PermanentError as error:
            self._bury(queued.seq, error)
            return
        self._allowance -= 1
        if queued.message.qos:
            self._inflight[mid] = queued
        else:
            self._acked.add(queued.seq)

    def _guarded(self, write: Callable[[], object]) -> bool:
        """Run a write to the spool; a full disk delays it and nothing else."""
        try:
            write()
        except TransientError as error:
            _log.warning("spool_write_postponed", error=error)
            return False
        return True


def _packet_bytes(wire: WireMessage) -> int:
    properties = sum(len(k.encode()) + len(v.encode()) + 5 for k, v in wire.user_properties)
    return len(wire.topic.encode()) + len(wire.payload) + properties + PACKET_OVERHEAD_BYTES
