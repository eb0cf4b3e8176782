from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from deploy.broker import close_client
from deploy.demo.broker import start_broker
from deploy.demo.children import Child
from deploy.demo.events import EventStream, Mix
from deploy.demo.ledger import Ledger
from deploy.demo.link import Link
from deploy.demo.plant import Pace, Plant
from deploy.demo.wire import open_client
from edge_agent.contract.event import event_id, parse_event
from edge_agent.contract.task import load_task, parse_task
from edge_agent.errors import PermanentError
from tests.fakes.mqtt_peer import wait_until

REFERENCE_TASK = Path(__file__).parents[2] / "export/reference/task/task.yaml"


until = partial(wait_until, timeout_s=10.0)


class TestEvents:
    @pytest.mark.parametrize("mix", ["steady", "flood", "load"])
    def test_every_event_is_valid_and_its_own(self, mix: Mix) -> None:
        task, stream = load_task(REFERENCE_TASK), EventStream()
        events = [parse_event(json.dumps(stream.next(mix))) for _ in range(500)]
        assert len({event_id(event) for event in events}) == 500
        assert all(task.render(event) for event in events)

    def test_equal_seeds_give_equal_days(self) -> None:
        one, other = EventStream(7), EventStream(7)
        assert [one.next("flood") for _ in range(50)] == [other.next("flood") for _ in range(50)]

    def test_flood_is_mostly_repeats_and_holds_long_events(self) -> None:
        stream = EventStream()
        flood = [stream.next("flood") for _ in range(400)]
        assert sum(event["count"] > 1 for event in flood) > 300
        long = [event for event in flood if str(event["text"]).startswith("fault dump")]
        assert 10 < len(long) < 80
        # Not one character is cut by the task's template: they are long, not overlong.
        assert all(130 < len(str(event["text"])) <= 160 for event in long)

    def test_steady_state_holds_none(self) -> None:
        stream = EventStream()
        assert max(len(str(stream.next("steady")["text"])) for _ in range(500)) < 60


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(1000):
                connection.sendall(chunk)


class TestLink:
    def test_cut_resets_what_is_open_and_lets_nothing_through_until_restored(self) -> None:
        echo = Echo()
        link = Link("127.0.0.1", echo.port)
        with echo.server, socket.create_connection(("127.0.0.1", link.port), timeout=5) as open_one:
            open_one.sendall(b"hello")
            assert open_one.recv(10) == b"hello"
            link.cut()
            assert not link.up
            with pytest.raises(ConnectionResetError):
                open_one.recv(10)
            accepted = echo.accepted
            with (
                pytest.raises(ConnectionResetError),
                socket.create_connection(("127.0.0.1", link.port), timeout=5) as refused,
            ):
                refused.recv(10)
            assert echo.accepted == accepted, "the broker must not even see the attempt"
            link.restore()
            with socket.create_connection(("127.0.0.1", link.port), timeout=5) as again:
                again.sendall(b"back")
                assert again.recv(10) == b"back"
            link.close()


class TestChildren:
    def test_child_that_ends_by_itself_is_noticed_with_its_last_words(self, tmp_path: Path) -> None:
        child = Child("dies", [sys.executable, "-c", "import sys; sys.exit('last words')"], tmp_path)
        until(lambda: not child.alive)
        with pytest.raises(PermanentError, match="last words") as caught:
            child.check()
        assert caught.value.code == "demo.child_ended"

    def test_child_that_ignores_sigterm_and_its_own_child_are_ended(self, tmp_path: Path) -> None:
        code = (
            "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print(p.pid, flush=True);"
            "time.sleep(600)"
        )
        child = Child("stubborn", [sys.executable, "-c", code], tmp_path)
        until(lambda: child.log.read_text().strip().isdigit())
        grandchild = int(child.log.read_text())
        assert child.stop(patience_s=0.2) == -signal.SIGKILL
        until(lambda: not Path(f"/proc/{grandchild}").exists() or b"Z" in _state(grandchild))

    def test_settings_in_our_environment_do_not_reach_the_node(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGE_AGENT_MQTT__HOST", "elsewhere")
        code = "import os; print(sorted(n for n in os.environ if n.startswith('EDGE_AGENT_')), os.environ['NO_PROXY'])"
        child = Child("env", [sys.executable, "-c", code], tmp_path)
        until(lambda: not child.alive)
        assert child.tail() == "[] 127.0.0.1"

    def test_missing_program_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(PermanentError) as caught:
            Child("none", ["/nonexistent/program"], tmp_path)
        assert caught.value.code == "disk.missing"


def _state(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2][:3]
    except FileNotFoundError:
        return b"Z"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto")),
        pytest.param("amqtt", marks=pytest.mark.needs("module:amqtt")),
    ],
)
def test_plant_counts_what_the_broker_took_and_waits_at_its_backlog(kind: str, tmp_path: Path) -> None:
    broker = start_broker("mosquitto" if kind == "mosquitto" else "amqtt", tmp_path)
    ledger = Ledger(
        parse_task(
            "name: triage\nversion: 1\nprompt: {prefix: p, event: [{field: text, label: t}]}\n"
            "output: {type: object, properties: {ok: {type: boolean}}}\n"
        )
    )
    ears = open_client("ears", broker.port, broker.protocol)
    heard: list[bytes] = []
    subscribed = threading.Event()
    ears.on_message = lambda _c, _u, message: heard.append(bytes(message.payload))
    ears.on_subscribe = lambda *_: subscribed.set()
    ears.subscribe("events", 1)
    assert subscribed.wait(5)
    mouth = open_client("mouth", broker.port, broker.protocol)
    plant = Plant(mouth, "events", ledger, lambda: time.time() * 1000)
    try:
        plant.enter(Pace("flood", per_s=2000, backlog=60))
        until(lambda: ledger.outstanding() == 60)
        # Nobody answers, so the plant must hold: it is the only one that could go on.
        until(lambda: plant.unacknowledged() == 0 and len(heard) == 60)
        assert ledger.totals().events_in == 60
        assert ledger.totals().lost == 60
        assert len({json.loads(payload)["id"] for payload in heard}) == 60
    finally:
        plant.close()
        close_client(mouth)
        close_client(ears)
        broker.child.stop()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto")),
        pytest.param("amqtt", marks=pytest.mark.needs("module:amqtt")),
    ],
)
def test_brokers_lose_nothing_that_was_under_way_when_the_link_was_cut(kind: str, tmp_path: Path) -> None:
    """A client that takes its time to acknowledge is cut off in the middle: everything arrives, later, unretained."""
    broker = start_broker("mosquitto" if kind == "mosquitto" else "amqtt", tmp_path)
    link = Link("127.0.0.1", broker.port)
    heard: list[tuple[str, bool]] = []
    subscribed = threading.Event()
    slow = threading.Event()

    def listen(port: int) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, "ears", clean_session=False, reconnect_on_failure=False)
        client.username_pw_set("ears", "x")
        client.manual_ack_set(True)

        def received(_client: paho.Client, _user: object, message: paho.MQTTMessage) -> None:
            if slow.is_set():
                return  # received, and never acknowledged
            heard.append((message.payload.decode(), message.retain))
            client.ack(message.mid, message.qos)

        def connected(*_: object) -> None:
            if not subscribed.is_set():
                client.subscribe("events", 1)

        client.on_message = received
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_connect = connected
        client.connect("127.0.0.1", port)
        client.loop_start()
        return client

    ears = listen(link.port)
    mouth = open_client("mouth", broker.port, broker.protocol)
    try:
        assert subscribed.wait(5)
        expected = [f"event {n}" for n in range(60)]
        published = [mouth.publish("events", text, qos=1) for text in expected[:20]]
        until(lambda: len(heard) == 20)
        slow.set()
        published += [mouth.publish("events", text, qos=1) for text in expected[20:40]]
        for info in published:
            info.wait_for_publish(5)
        link.cut()
        published += [mouth.publish("events", text, qos=1) for text in expected[40:]]
        for info in published:
            info.wait_for_publish(5)
        close_client(ears)
        slow.clear()
        link.restore()
        ears = listen(link.port)
        until(lambda: {text for text, _ in heard} == set(expected))
        assert not any(retained for _, retained in heard)
    finally:
        close_client(mouth)
        close_client(ears)
        link.close()
        broker.child.stop()
