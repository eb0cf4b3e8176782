"""A node with a real spool and a real uplink, whose model is a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from edge_agent.contract.event import event_id, parse_event
from edge_agent.contract.messages import Decision, ModelRef, Status, decision_id, now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import RefusedError
from edge_agent.settings import MqttSettings, SpoolSettings
from edge_agent.uplink.cloudevents import decision_message
from edge_agent.uplink.session import MqttUplink
from edge_agent.uplink.spool import Spool
from tests.fakes.mqtt_peer import Peer

TOPICS = NodeTopics("plant1", "press-4")
EVENTS = TOPICS.events("triage")
DECISIONS = "acme/plant1/forming/line2/press-4/_edgeai/triage"
MODEL = ModelRef(name="triage", version="1.0.0", digest="a" * 64)


def decision_of(task: str, given_id: str) -> Decision:
    return Decision(
        decision_id=decision_id(task, given_id, MODEL.digest),
        event_id=given_id,
        task=task,
        model=MODEL,
        decision={"category": "hydraulic", "severity": "high"},
        confidence={"category": 0.98, "severity": 0.91},
        route="device",
        latency_ms=41.5,
        timestamp_ms=now_ms(),
    )


def event(number: object, **fields: object) -> str:
    return json.dumps({"id": str(number), "machine": "press-4", "code": "E217", **fields})


def states(peer: Peer) -> list[str]:
    """What a peer heard of the node's state, in order."""
    return [Status.model_validate_json(seen.payload).state for seen in peer.seen if seen.topic == TOPICS.status]


class Node:
    """Implements `UplinkPorts`; ``fail_with`` raises from ``on_event`` before anything was written."""

    def __init__(
        self,
        directory: Path,
        settings: MqttSettings,
        spool_settings: SpoolSettings | None = None,
        *,
        takes_answers: bool = False,
    ) -> None:
        self.takes_answers = takes_answers
        self.settings = settings
        self.spool_settings = spool_settings or SpoolSettings()
        self.path = directory / "spool.sqlite"
        self.spool = Spool(self.path, self.spool_settings, deadletter_topic=TOPICS.deadletter)
        self.tasks = {"triage"}
        self.desired: list[bytes] = []
        self.answers: list[tuple[str, str, bytes]] = []
        self.calls = 0
        self.wills = 0
        self.fail_with: Callable[[], Exception | None] = lambda: None
        self._stop_working = threading.Event()
        self._worker: threading.Thread | None = None
        self.uplink = self._make_uplink()

    def _make_uplink(self) -> MqttUplink:
        rate_per_s = self.spool_settings.drain_per_s
        return MqttUplink(
            self.settings, TOPICS, self.spool, self, drain_per_s=rate_per_s, takes_answers=self.takes_answers
        )

    # ---- UplinkPorts

    def status(self, state: Literal["online", "draining", "offline"]) -> bytes:
        self.wills += state == "offline"
        return Status(state=state, boot_id="boot-1", since_ms=now_ms(), version="0.1.0").model_dump_json().encode()

    def on_event(self, task: str, payload: bytes) -> None:
        self.calls += 1
        error = self.fail_with()
        if error is not None:
            raise error
        if task not in self.tasks:
            self._refuse(RefusedError("task.unknown", f"no task {task!r}"), task, None, payload)
        try:
            event = parse_event(payload)
        except RefusedError as refused:
            self._refuse(refused, task, None, payload)
        else:
            priority: Literal["safety", "bulk"] = "safety" if event.get("code") == "STOP" else "bulk"
            self.spool.accept(task, event_id(event), payload, priority, now_ms())

    def _refuse(self, error: RefusedError, task: str, given_id: str | None, payload: bytes) -> None:
        self.spool.bury(None, error, task=task, event_id=given_id, payload=payload)
        raise error

    def on_desired(self, envelope: bytes) -> None:
        self.desired.append(envelope)

    def on_escalation_answer(self, task: str, decision_id: str, payload: bytes) -> None:
        self.answers.append((task, decision_id, payload))

    def on_connected(self) -> Sequence[tuple[str, bytes]]:
        return [(TOPICS.meta, b'{"schema_version":1}')]

    # ---- life

    def start(self) -> None:
        self.uplink.start()

    def work(self) -> None:
        """Answer every event from now on."""
        self._worker = threading.Thread(target=self._answer_all, daemon=True)
        self._worker.start()

    def answer_one(self) -> bool:
        event = self.spool.next_event()
        if event is None:
            return False
        message = decision_message(decision_of(event.task, event.event_id), DECISIONS, TOPICS)
        return self.spool.complete(event.inbox_id, [message])

    def stop(self) -> None:
        self._stop_working.set()
        if self._worker is not None:
            self._worker.join(5)
        self.uplink.stop(2.0)
        self.spool.close()

    def restart(self) -> None:
        """A new process on the same disk, as far as the broker can tell."""
        self.stop()
        self._stop_working.clear()
        self._worker = None
        self.spool = Spool(self.path, self.spool_settings, deadletter_topic=TOPICS.deadletter)
        self.uplink = self._make_uplink()
        self.start()

    def _answer_all(self) -> None:
        while not self._stop_working.is_set():
            self.spool.inbox_changed.clear()
            if not self.answer_one():
                self.spool.inbox_changed.wait(0.05)


MakeNode = Callable[..., Node]
