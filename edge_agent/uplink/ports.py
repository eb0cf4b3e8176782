"""What the uplink asks of the agent. The agent implements it; the uplink never imports the agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol


class UplinkPorts(Protocol):
    """Callbacks of the uplink. They run on the uplink's own threads, never on the network thread."""

    def status(self, state: Literal["online", "draining", "offline"]) -> bytes:
        """The payload of the ``status`` topic; ``offline`` is also the will, made anew for every connection."""

    def on_event(self, task: str, payload: bytes) -> None:
        """Take one event, normally by ``Spool.accept``.

        Called inside ``Spool.batch``: what it writes becomes durable with the batch, and the message is acknowledged
        only then.

        Raises:
            RefusedError: the event is wrong and was already buried; it is acknowledged.
            TransientError: try the whole batch again later; nothing is acknowledged. ``inbox.full`` is the exception:
                that one event is buried by the uplink and acknowledged, so that it cannot hold up a safety event.
        """

    def on_desired(self, envelope: bytes) -> None:
        """Take note of the desired state; returns at once. An empty envelope means that it was cleared."""

    def on_escalation_answer(self, task: str, decision_id: str, payload: bytes) -> None:
        """Take an answer to an escalated event; called as ``on_event`` is, and raises ``TransientError`` as it does."""

    def on_connected(self) -> Sequence[tuple[str, bytes]]:
        """Retained messages to publish after the birth (meta, reported): topic and payload."""
