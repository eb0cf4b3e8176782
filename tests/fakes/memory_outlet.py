"""A broker's answering side without a network: implements the drain's `Outlet`."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from edge_agent.errors import PermanentError, TransientError
from edge_agent.uplink.cloudevents import WireMessage
from edge_agent.uplink.connection import Puback


@dataclass(frozen=True)
class Sent:
    mid: int
    wire: WireMessage
    qos: int
    retain: bool


class MemoryOutlet:
    """Takes every message; answers when told to, with what it is told."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.is_lost = False
        self._pubacks: queue.SimpleQueue[Puback] = queue.SimpleQueue()
        self._answered = 0

    @property
    def pubacks(self) -> queue.SimpleQueue[Puback]:
        return self._pubacks

    def publish(self, wire: WireMessage, *, qos: int, retain: bool, expiry_s: int | None = None) -> int:
        if self.is_lost:
            raise TransientError("mqtt.connection_lost", "gone")
        if "#" in wire.topic:
            raise PermanentError("mqtt.topic_refused", "wildcard")
        mid = len(self.sent) + 1
        self.sent.append(Sent(mid, wire, qos, retain))
        return mid

    def answer(self, reason: int = 0, *, count: int | None = None) -> None:
        """PUBACK the next ``count`` messages (all of them by default) with ``reason``."""
        last = len(self.sent) if count is None else self._answered + count
        for sent in self.sent[self._answered : last]:
            self._pubacks.put(Puback(sent.mid, reason))
        self._answered = last

    def payloads(self) -> list[bytes]:
        return [sent.wire.payload for sent in self.sent]
