"""Small first, big when needed: the whole daemon, a real broker, and a server that answers, hangs or refuses."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_agent.doctor import doctor
from tests.fakes.brokers import BrokerProcess
from tests.fakes.bundles import BundleVariant
from tests.fakes.chat_server import ChatServer, Turn
from tests.fakes.daemon import DECISIONS, EVENTS, TOPICS, Daemon, install
from tests.fakes.mqtt_peer import Peer, wait_until

pytestmark = pytest.mark.needs("mosquitto")

KEY = "sk-zq-4711-very-secret"
LARGE = {"category": "hydraulic", "severity": "high", "action": "call", "escalate": True, "component": "pump"}
PRIVATE = "zq-press-4711"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(json.dumps(LARGE)) as one:
        yield one


@pytest.fixture
def unsure_bundle(variant: Callable[[], BundleVariant]) -> Callable[..., Path]:
    """The reference bundle with a threshold that no answer reaches, and a section `escalation`."""

    def make(**escalation: Any) -> Path:
        bundle = variant()
        task = yaml.safe_load((bundle.path / "tasks/triage/task.yaml").read_text())
        task["thresholds"]["severity"] = 1.0
        task["escalation"] = {"to": "http", "budget_per_hour": 3600, "share": ["text", "code"], **escalation}
        bundle.put("tasks/triage/task.yaml", yaml.safe_dump(task, sort_keys=False))
        bundle.seal()
        return bundle.path

    return make


@contextmanager
def running(directory: Path, broker: BrokerProcess, **escalation: Any) -> Iterator[Daemon]:
    if "base_url" in escalation:
        key_file = directory / "api-key"
        key_file.touch(mode=0o600)
        key_file.write_text(KEY)
        escalation = {"model": "large", "api_key_file": str(key_file), **escalation}
    daemon = Daemon(directory, broker.port, escalation=escalation)
    try:
        yield daemon.start()
    finally:
        daemon.close()


def an_event(number: int | str, **more: Any) -> str:
    return json.dumps({"id": f"e-{number}", "machine": PRIVATE, "code": "E217", "text": "oil pressure low", **more})


def published(peer: Peer, event_id: str) -> list[dict[str, Any]]:
    """Every message about one event, repeated ones too."""
    decisions = [json.loads(seen.payload) for seen in list(peer.seen) if seen.topic == DECISIONS]
    return [decision for decision in decisions if decision["event_id"] == event_id]


def pending(daemon: Daemon) -> int:
    with sqlite3.connect(f"file:{daemon.state_dir}/spool.sqlite?mode=ro", uri=True) as db:
        return int(db.execute("SELECT count(*) FROM escalations").fetchone()[0])


def test_an_unsure_event_is_asked_about_and_its_decision_is_published_once(
    tmp_path: Path, broker: BrokerProcess, peer: Peer, server: ChatServer, unsure_bundle: Callable[..., Path]
) -> None:
    with running(tmp_path, broker, base_url=server.url) as daemon:
        install(daemon, unsure_bundle(), peer, broker.port)
        for number in range(20):
            peer.deliver(EVENTS, an_event(number))
            peer.deliver(EVENTS, an_event(number))  # redelivered while it is asked about, or after
        wait_until(lambda: all(published(peer, f"e-{number}") for number in range(20)), 30.0)
        wait_until(lambda: queue(peer).get("escalations", {}).get("answered", 0) >= 20)
        decisions = [published(peer, f"e-{number}") for number in range(20)]
        assert [len(one) for one in decisions] == [1] * 20
        assert {one[0]["route"] for one in decisions} == {"escalated"}
        assert decisions[0][0]["decision"] == LARGE
        assert queue(peer)["dropped"]["event.duplicate"] >= 20
        asked = [asked for asked in server.asked if asked.user["event"] == {"text": "oil pressure low", "code": "E217"}]
        assert len(asked) == 20
        assert not [asked for asked in server.asked if PRIVATE.encode() in asked.raw]
        assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
        assert daemon.end() == 0
        assert KEY not in daemon.log.read_text()


def test_a_server_that_is_not_there_costs_the_best_guess_after_the_timeout(
    tmp_path: Path, broker: BrokerProcess, peer: Peer, unsure_bundle: Callable[..., Path]
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # not listening: it refuses, and no other process can take the port
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with running(tmp_path, broker, base_url=url) as daemon:
            install(daemon, unsure_bundle(timeout_s=2.0), peer, broker.port)
            peer.deliver(EVENTS, an_event(1))
            wait_until(lambda: published(peer, "e-1"), 30.0)
            [decision] = published(peer, "e-1")
            assert (decision["route"], decision["escalation"]["outcome"]) == ("abstained", "timed_out")
            assert decision["unsure_fields"]
            assert decision["decision"].keys() == LARGE.keys()
            assert KEY not in daemon.log.read_text()


def test_a_killed_daemon_asks_again_after_its_start_and_publishes_one_decision(
    tmp_path: Path, broker: BrokerProcess, peer: Peer, server: ChatServer, unsure_bundle: Callable[..., Path]
) -> None:
    with running(tmp_path, broker, base_url=server.url) as daemon:
        install(daemon, unsure_bundle(timeout_s=600.0), peer, broker.port)
        wait_until(lambda: pending(daemon) == 0)
        never = threading.Event()
        server.next(Turn(wait_for=never, always=True))
        before = len(server.asked)
        for number in range(3):
            peer.deliver(EVENTS, an_event(number))
        wait_until(lambda: pending(daemon) == 3 and len(server.asked) > before)
        daemon.end(signal.SIGKILL)
        peer.deliver(EVENTS, an_event(0))
        server.clear()
        daemon.start()
        wait_until(lambda: all(published(peer, f"e-{number}") for number in range(3)), 30.0)
        wait_until(lambda: pending(daemon) == 0)
        never.set()
        assert daemon.end() == 0  # whatever it had to say is said
        decisions = [published(peer, f"e-{number}") for number in range(3)]
        assert [len({d["decision_id"] for d in one}) for one in decisions] == [1, 1, 1]
        assert {d["route"] for one in decisions for d in one} == {"escalated"}


def test_a_person_answers_over_mqtt_and_a_second_answer_is_counted(
    tmp_path: Path, broker: BrokerProcess, peer: Peer, unsure_bundle: Callable[..., Path]
) -> None:
    with running(tmp_path, broker, mqtt=True) as daemon:
        install(daemon, unsure_bundle(to="mqtt", share=["text"], hint=True, timeout_s=600.0), peer, broker.port)
        peer.deliver(EVENTS, an_event("ask", text="what is that noise"))
        [seen] = peer.wait_for(lambda seen: b"what is that noise" in seen.payload and "/escalations/" in seen.topic)
        assert (seen.qos, seen.retain) == (1, False)
        question = json.loads(seen.payload)
        assert seen.topic == TOPICS.escalation("triage", question["decision_id"])
        assert question["event"] == {"text": "what is that noise"}
        assert question["hint"]["decision"].keys() == LARGE.keys()
        assert PRIVATE.encode() not in seen.payload
        peer.deliver(question["answer_topic"], json.dumps({"decision": {**LARGE, "severity": "apocalyptic"}}))
        peer.deliver(question["answer_topic"], json.dumps({"decision": LARGE, "answered_by": "ann"}))
        wait_until(lambda: published(peer, "e-ask"))
        peer.deliver(question["answer_topic"], json.dumps({"decision": {**LARGE, "severity": "low"}}))
        wait_until(lambda: "escalation.answer_late" in queue(peer).get("dropped", {}))
        [decision] = published(peer, "e-ask")
        assert (decision["route"], decision["decision"]) == ("escalated", LARGE)
        assert (decision["escalation"]["to"], decision["escalation"]["answered_by"]) == ("mqtt", "ann")
        assert decision["decision_id"] == question["decision_id"]
        dropped = queue(peer)["dropped"]
        assert (dropped["escalation.answer_outside_schema"], dropped["escalation.answer_late"]) == (1, 1)
        assert daemon.alive


def test_a_refused_key_raises_an_alarm_and_a_new_key_clears_it_without_a_restart(
    tmp_path: Path, broker: BrokerProcess, peer: Peer, server: ChatServer, unsure_bundle: Callable[..., Path]
) -> None:
    server.next(Turn(status=401, always=True))
    with running(tmp_path, broker, base_url=server.url) as daemon:
        install(daemon, unsure_bundle(), peer, broker.port)
        [alarm] = peer.wait_for(lambda seen: seen.topic == TOPICS.alarm("escalation") and bool(seen.payload))
        assert json.loads(alarm.payload)["code"] == "escalation.denied"
        asked = len(server.asked)
        peer.deliver(EVENTS, an_event("denied"))
        wait_until(lambda: published(peer, "e-denied"))
        assert published(peer, "e-denied")[0]["escalation"]["reason"] == "escalation.denied"
        assert len(server.asked) == asked, "a refused key is not tried again"
        server.clear()
        (tmp_path / "api-key").write_text("another-key")
        peer.deliver(EVENTS, an_event("granted"))
        peer.wait_for(lambda seen: seen.topic == TOPICS.alarm("escalation") and not seen.payload)
        wait_until(lambda: published(peer, "e-granted"))
        assert published(peer, "e-granted")[0]["route"] == "escalated"
        assert KEY not in daemon.log.read_text()


def test_the_doctor_has_a_line_for_it(
    tmp_path: Path, broker: BrokerProcess, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, broker, base_url=server.url) as daemon:
        lines = []
        for turn in (None, Turn(status=401)):
            server.next(*([turn] if turn else []))
            capsys.readouterr()
            doctor(daemon.config, [], as_json=True)
            checks = json.loads(capsys.readouterr().out)["checks"]
            lines.append(next(check for check in checks if check["name"] == "escalation"))
        assert (lines[0]["ok"], lines[1]["ok"], lines[1]["code"]) == (True, False, "escalation.denied")
        assert "lists model 'large'" in lines[0]["detail"]
        assert KEY not in json.dumps(lines)


def queue(peer: Peer) -> dict[str, Any]:
    """The newest ``tele/queue``."""
    found = [json.loads(seen.payload) for seen in list(peer.seen) if seen.topic == TOPICS.tele("queue")]
    return found[-1] if found else {}
