"""The management connection against a real mosquitto."""

from __future__ import annotations

import functools
import gc
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.contract.messages import Decision, Status
from edge_agent.errors import TransientError
from edge_agent.settings import MqttSettings, SpoolSettings
from edge_agent.uplink.broker_check import check_broker
from edge_agent.uplink.records import OutboundMessage
from tests.fakes.brokers import BrokerProcess, free_port, mosquitto
from tests.fakes.cut_proxy import CutProxy
from tests.fakes.mqtt_peer import Peer, wait_until
from tests.fakes.node import DECISIONS, TOPICS, Node, decision_of

pytestmark = pytest.mark.needs("mosquitto")

MakeNode = Callable[..., Node]
MakePeer = Callable[..., Peer]
MakeProxy = Callable[[int], CutProxy]
EVENTS = TOPICS.events("triage")


def event(number: object, **fields: object) -> str:
    return json.dumps({"id": str(number), "machine": "press-4", "code": "E217", **fields})


def states(peer: Peer) -> list[str]:
    return [Status.model_validate_json(seen.payload).state for seen in peer.seen if seen.topic == TOPICS.status]


def test_an_event_becomes_a_cloudevent_in_binary_mode(broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    reader = peer(broker.port, "#")
    device = node(broker.port)
    device.start()
    device.work()
    reader.on(TOPICS.status)
    reader.deliver(EVENTS, event("7-umlaut-ü"))
    [seen] = reader.on(DECISIONS)
    decision = Decision.model_validate_json(seen.payload)
    assert decision.event_id == "7-umlaut-ü"
    assert (seen.qos, seen.retain, seen.content_type) == (1, False, "application/json")
    time = seen.user_properties.pop("time")
    assert time.endswith("Z")
    assert seen.user_properties == {
        "specversion": "1.0",
        "id": decision.decision_id,
        "source": "edge/v1/plant1/press-4",
        "type": "io.edge-agent.decision.v1",
        "subject": "7-umlaut-ü",
        "sequence": "000000000001",
    }
    wait_until(lambda: device.spool.counts().outbox == 0)


def test_birth_is_retained_and_comes_after_the_subscriptions(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    before = peer(broker.port, TOPICS.status)
    device = node(broker.port)
    device.start()
    before.on(TOPICS.status)
    # Whoever sees the birth may send at once.
    before.deliver(EVENTS, event(1))
    wait_until(lambda: device.spool.counts().inbox == 1)
    late = peer(broker.port, TOPICS.status, TOPICS.meta)
    [birth] = late.on(TOPICS.status)
    [meta] = late.on(TOPICS.meta)
    assert birth.retain
    assert meta.retain
    assert states(late) == ["online"]


def test_a_clean_stop_says_draining_then_offline_and_sends_what_waits(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    reader = peer(broker.port, TOPICS.status, DECISIONS)
    device = node(broker.port)
    device.start()
    reader.on(TOPICS.status)
    for number in range(50):
        device.spool.enqueue(OutboundMessage(DECISIONS, str(number).encode()))
    device.uplink.stop(5.0)
    reader.wait_for(lambda _: states(reader)[-1:] == ["offline"])
    assert states(reader) == ["online", "draining", "offline"]
    assert [int(seen.payload) for seen in reader.on(DECISIONS, 50)] == list(range(50))


def test_the_will_is_published_when_the_process_is_killed(
    broker: BrokerProcess, peer: MakePeer, tmp_path: Path
) -> None:
    reader = peer(broker.port, TOPICS.status)
    script = (
        "import sys, threading; from pathlib import Path; from edge_agent.settings import MqttSettings;"
        "from tests.fakes.node import Node;"
        f"node = Node(Path({str(tmp_path)!r}), MqttSettings(host='127.0.0.1', port={broker.port}));"
        "node.start(); threading.Event().wait()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    try:
        reader.on(TOPICS.status)
        assert states(reader) == ["online"]
    finally:
        child.kill()
        child.wait()
    assert reader.on(TOPICS.status, 2)[1].retain
    assert states(reader) == ["online", "offline"]


def test_events_sent_while_the_node_is_away_are_kept_by_the_broker(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    sender = peer(broker.port, TOPICS.status)
    device = node(broker.port)
    device.start()
    sender.on(TOPICS.status)
    device.uplink.stop()
    for number in range(30):
        sender.deliver(EVENTS, event(number))
    device.restart()
    wait_until(lambda: device.spool.counts().inbox == 30)


def test_decisions_made_during_an_outage_are_delivered_in_order_afterwards(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    reader = peer(broker.port, DECISIONS, keeps_session=True)
    device = node(broker.port)
    device.start()
    wait_until(lambda: device.uplink.connected)
    broker.stop()
    wait_until(lambda: not device.uplink.connected)
    for number in range(100):
        device.spool.accept("triage", str(number), b"{}", "normal", 1)
        assert device.answer_one()
    assert device.spool.counts().outbox == 100
    broker.start()
    found = reader.on(DECISIONS, 100)
    assert [int(Decision.model_validate_json(seen.payload).event_id) for seen in found] == list(range(100))
    assert [int(seen.user_properties["sequence"]) for seen in found] == list(range(1, 101))
    wait_until(lambda: device.spool.counts().outbox == 0)


def test_a_broker_killed_in_mid_flow_loses_nothing(broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    device = node(broker.port)
    device.start()
    device.work()
    sender = peer(broker.port, DECISIONS, keeps_session=True)
    wait_until(lambda: device.uplink.connected)
    for number in range(60):
        sender.deliver(EVENTS, event(number))
        if number == 30:
            # SIGTERM: mosquitto saves its sessions, as on any orderly restart of a broker.
            broker.stop()
            broker.start()
            wait_until(lambda: device.uplink.connected)
    wait_until(lambda: device.spool.counts().inbox == 0 and device.spool.counts().outbox == 0)
    found = sender.wait_for(lambda s: s.topic == DECISIONS, 60)
    answered = {Decision.model_validate_json(seen.payload).event_id for seen in found}
    assert answered == {str(number) for number in range(60)}


def test_a_broker_that_forgot_the_session_is_subscribed_again(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer, tmp_path: Path
) -> None:
    device = node(broker.port)
    device.start()
    wait_until(lambda: device.uplink.connected)
    broker.stop(signal.SIGKILL)
    wait_until(lambda: not device.uplink.connected)
    (tmp_path / f"mosquitto-{broker.port}.db").unlink(missing_ok=True)
    broker.start()
    reader = peer(broker.port, TOPICS.status)
    wait_until(lambda: "online" in states(reader))
    reader.deliver(EVENTS, event(1))
    wait_until(lambda: device.spool.counts().inbox == 1)


def test_an_event_whose_acknowledgement_was_lost_comes_again_and_is_answered_once(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port)
    device.start()
    device.work()
    sender = peer(broker.port, DECISIONS, TOPICS.status)
    sender.on(TOPICS.status)
    network.swallow("up")
    sender.deliver(EVENTS, event(1))
    wait_until(lambda: device.spool.counts().outbox == 1 and device.spool.counts().inbox == 0)
    network.cut()
    network.heal()
    wait_until(lambda: device.spool.counts().dropped.get("event.duplicate") == 1)
    wait_until(lambda: device.spool.counts().outbox == 0)
    # A marker behind it on the same topic proves that no second decision is still under way.
    device.spool.enqueue(OutboundMessage(DECISIONS, b"marker"))
    sender.wait_for(lambda seen: seen.payload == b"marker")
    assert len([s for s in sender.seen if s.topic == DECISIONS and s.payload != b"marker"]) == 1


def test_a_decision_whose_puback_was_lost_is_sent_again_under_the_same_id(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port)
    reader = peer(broker.port, DECISIONS, TOPICS.meta)
    device.start()
    reader.on(TOPICS.meta)
    network.swallow("down")
    device.spool.accept("triage", "1", b"{}", "normal", 1)
    device.answer_one()
    reader.on(DECISIONS)
    assert device.spool.counts().outbox == 1
    network.cut()
    network.heal()
    first, second = reader.on(DECISIONS, 2)
    assert first.user_properties["id"] == second.user_properties["id"]
    assert first.payload == second.payload
    wait_until(lambda: device.spool.counts().outbox == 0)


def test_a_silent_network_is_noticed_by_the_keepalive(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port, keepalive_s=1)
    device.start()
    reader = peer(broker.port, TOPICS.status)
    reader.on(TOPICS.status)
    network.swallow("up")
    network.swallow("down")
    # The broker misses us after 1.5 keepalives and publishes the will; we miss the broker's answer as well.
    wait_until(lambda: "offline" in states(reader))
    network.heal()
    wait_until(lambda: states(reader)[-1] == "online")


def test_a_flapping_network_delivers_every_decision(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port)
    device.start()
    device.work()
    sender = peer(broker.port, DECISIONS)
    for number in range(120):
        sender.deliver(EVENTS, event(number)) if number else wait_until(lambda: device.uplink.connected)
        if number % 40 == 20:
            network.cut()
    wait_until(lambda: device.spool.counts().inbox == 0 and device.spool.counts().outbox == 0)
    found = Counter(s.user_properties["id"] for s in sender.wait_for(lambda s: s.topic == DECISIONS, 119))
    wanted = {decision_of("triage", str(number)).decision_id for number in range(1, 120)}
    wait_until(lambda: {s.user_properties["id"] for s in sender.seen} == wanted)
    assert found.keys() <= wanted


def test_a_ten_megabyte_event_is_not_even_sent_to_us_on_mqtt_5(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    device = node(broker.port)
    device.start()
    sender = peer(broker.port, TOPICS.status)
    sender.on(TOPICS.status)
    sender.deliver(EVENTS, b"x" * 10_000_000)
    sender.deliver(EVENTS, event("after"))
    wait_until(lambda: device.spool.counts().inbox == 1)
    assert device.spool.counts().dead_letters == 0
    assert device.uplink.connected


def test_a_ten_megabyte_event_on_mqtt_3_is_buried_without_its_content(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    device = node(broker.port, protocol="3.1.1")
    device.start()
    sender = peer(broker.port, TOPICS.status, TOPICS.deadletter)
    sender.on(TOPICS.status)
    sender.deliver(EVENTS, b"x" * 10_000_000)
    sender.deliver(EVENTS, event("after"))
    wait_until(lambda: device.spool.counts().inbox == 1)
    [letter] = device.spool.dead_letters()
    assert (letter.code, letter.task, letter.payload) == ("event.too_large", "triage", None)
    [seen] = sender.on(TOPICS.deadletter)
    assert json.loads(seen.payload)["error"]["code"] == "event.too_large"
    assert device.spool.counts().dropped == {"event.too_large": 1}


def test_malformed_events_are_acknowledged_buried_and_announced(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    malformed = {
        b"\xff\xfe\x00broken": "event.not_utf8",
        b'{"id": 1,': "event.not_json",
        b"[" * 5000: "event.not_json",
        b"[1, 2]": "event.not_object",
        b'{"a": {"b": 1}}': "event.bad_field",
        b"": "event.not_json",
    }
    device = node(broker.port)
    device.start()
    sender = peer(broker.port, TOPICS.status, TOPICS.deadletter)
    sender.on(TOPICS.status)
    for payload in malformed:
        sender.deliver(EVENTS, payload)
    seen = sender.on(TOPICS.deadletter, len(malformed))
    assert [json.loads(s.payload)["error"]["code"] for s in seen] == list(malformed.values())
    assert {letter.payload: letter.code for letter in device.spool.dead_letters()} == malformed
    # They were acknowledged: a new session brings none of them again.
    device.restart()
    sender.deliver(EVENTS, event("after"))
    wait_until(lambda: device.spool.counts().inbox == 1)
    assert device.spool.counts().dead_letters == len(malformed)


def test_strange_task_names_are_refused_and_kept(broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    strange = ["no such task", "$SYS", "ünïcode", "a" * 300, "%s{x}'; DROP TABLE inbox", "*"]
    device = node(broker.port)
    device.start()
    sender = peer(broker.port, TOPICS.status)
    sender.on(TOPICS.status)
    for task in strange:
        sender.deliver(f"{TOPICS.base}/events/{task}", event(1))
    wait_until(lambda: device.spool.counts().dead_letters == len(strange))
    letters = device.spool.dead_letters()
    assert {letter.task for letter in letters} == {task[:128] for task in strange}
    assert {letter.code for letter in letters} == {"task.unknown"}


def test_topics_below_or_beside_an_event_topic_are_not_events(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    device = node(broker.port, sources=[{"topic": "plant/+/alarms/#", "task": "triage"}])
    device.start()
    sender = peer(broker.port, TOPICS.status)
    sender.on(TOPICS.status)
    sender.deliver(f"{TOPICS.base}/events/triage/extra", event(1))
    sender.deliver(f"{TOPICS.base}/events", event(2))
    sender.deliver("plant/hall-2/alarms/oven/over", event(3))
    wait_until(lambda: device.spool.counts().inbox == 1)
    waiting = device.spool.next_event()
    assert waiting is not None
    assert (waiting.event_id, waiting.task) == ("3", "triage")


def test_a_retained_message_on_an_event_topic_is_no_event(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    sender = peer(broker.port, TOPICS.status)
    sender.deliver(EVENTS, event("old"), retain=True)
    device = node(broker.port, protocol="3.1.1")
    device.start()
    wait_until(lambda: device.spool.counts().dropped == {"event.retained": 1})
    sender.deliver(EVENTS, event("new"), retain=True)
    wait_until(lambda: device.spool.counts().inbox == 1)


def test_the_desired_state_arrives_with_every_new_session_and_its_clearing_too(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    sender = peer(broker.port, TOPICS.status)
    sender.deliver(TOPICS.model_desired, b"envelope-1", retain=True)
    device = node(broker.port)
    device.start()
    wait_until(lambda: device.desired == [b"envelope-1"])
    sender.deliver(TOPICS.model_desired, b"envelope-2", retain=True)
    sender.deliver(TOPICS.model_desired, b"", retain=True)
    wait_until(lambda: device.desired == [b"envelope-1", b"envelope-2", b""])


def test_a_full_disk_holds_events_unacknowledged_and_goes_on_when_space_returns(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    device = node(broker.port)
    device.fail_with = lambda: TransientError("disk.full", "no room")
    device.start()
    sender = peer(broker.port, TOPICS.status)
    sender.on(TOPICS.status)
    for number in range(5):
        sender.deliver(EVENTS, event(number))
    wait_until(lambda: device.calls >= 2)
    assert device.spool.counts().inbox == 0
    # A new session proves that they were not acknowledged: the broker has them still.
    device.restart()
    wait_until(lambda: device.calls >= 4)
    device.fail_with = lambda: None
    wait_until(lambda: device.spool.counts().inbox == 5)


def test_a_full_inbox_sheds_with_a_dead_letter_and_still_takes_safety_events(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    small = SpoolSettings(inbox_max_events=3)
    device = node(broker.port, spool=small)
    device.start()
    sender = peer(broker.port, TOPICS.status)
    sender.on(TOPICS.status)
    for number in range(60):
        sender.deliver(EVENTS, event(number))
    sender.deliver(EVENTS, event("emergency", code="STOP"))
    wait_until(lambda: device.spool.counts().dropped.get("inbox.displaced") == 1)
    first = device.spool.next_event()
    assert first is not None
    assert first.event_id == "emergency"
    counts = device.spool.counts()
    assert (counts.inbox, counts.dead_letters) == (3, 58)
    assert counts.dropped["inbox.full"] == 57


def test_a_defect_in_a_port_costs_one_event_and_not_the_intake(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    device = node(broker.port)
    outcomes: list[Exception | None] = [KeyError("a bug"), None]
    device.fail_with = lambda: outcomes.pop(0)
    device.start()
    sender = peer(broker.port, TOPICS.status)
    sender.on(TOPICS.status)
    sender.deliver(EVENTS, event(1))
    sender.deliver(EVENTS, event(2))
    wait_until(lambda: device.spool.counts().inbox == 1)
    assert device.spool.dead_letters()[0].code == "event.intake_failed"


def test_telemetry_expires_in_the_broker_and_is_not_stored_while_offline(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    device = node(broker.port)
    assert not device.uplink.publish_telemetry(TOPICS.tele("hw"), b"{}")
    reader = peer(broker.port, TOPICS.tele("+"), TOPICS.status)
    device.start()
    reader.on(TOPICS.status)
    assert device.uplink.publish_telemetry(TOPICS.tele("hw"), b'{"x":1}', expiry_s=60)
    [seen] = reader.on(TOPICS.tele("hw"))
    assert (seen.qos, seen.retain) == (0, False)
    assert seen.expiry_s is not None
    assert 55 <= seen.expiry_s <= 60


def test_retained_state_set_while_offline_arrives_once_and_latest(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    reader = peer(broker.port, TOPICS.model_reported)
    device = node(broker.port)
    for state in (b"downloading", b"verifying", b"committed"):
        device.uplink.publish_retained(TOPICS.model_reported, state)
    device.start()
    wait_until(lambda: device.uplink.connected)
    device.uplink.publish_retained(TOPICS.model_reported, b"idle")
    reader.wait_for(lambda seen: seen.payload == b"idle")
    assert [seen.payload for seen in reader.seen] in ([b"committed", b"idle"], [b"idle"])


def test_the_receive_maximum_of_the_broker_is_kept(node: MakeNode, peer: MakePeer, tmp_path: Path) -> None:
    strict = mosquitto(tmp_path, "max_inflight_messages 2")
    strict.start()
    try:
        reader = peer(strict.port, DECISIONS)
        device = node(strict.port)
        for number in range(100):
            device.spool.enqueue(OutboundMessage(DECISIONS, str(number).encode()))
        device.start()
        assert [int(seen.payload) for seen in reader.on(DECISIONS, 100)] == list(range(100))
        wait_until(lambda: device.spool.counts().outbox == 0)
    finally:
        strict.stop()


def test_a_message_beyond_the_brokers_packet_size_is_buried_and_the_next_one_goes(
    node: MakeNode, peer: MakePeer, tmp_path: Path
) -> None:
    strict = mosquitto(tmp_path, "max_packet_size 2000")
    strict.start()
    try:
        reader = peer(strict.port, DECISIONS)
        device = node(strict.port)
        device.spool.enqueue(OutboundMessage(DECISIONS, b"x" * 5000))
        device.spool.enqueue(OutboundMessage(DECISIONS, b"small"))
        device.start()
        assert reader.on(DECISIONS)[0].payload == b"small"
        assert device.spool.dead_letters()[0].code == "mqtt.packet_too_large"
        wait_until(lambda: device.spool.counts().outbox == 0)
    finally:
        strict.stop()


def test_a_topic_that_we_may_not_write_is_buried_counted_and_does_not_block(
    node: MakeNode, peer: MakePeer, tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite edge/#\ntopic read #\ntopic write acme/allowed\n")
    strict = mosquitto(tmp_path, f"acl_file {acl}")
    strict.start()
    try:
        reader = peer(strict.port, "#")
        device = node(strict.port)
        device.spool.enqueue(OutboundMessage("acme/forbidden", b"decision"))
        device.spool.enqueue(OutboundMessage("acme/allowed", b"next"))
        device.start()
        reader.on("acme/allowed")
        [seen] = reader.on(TOPICS.deadletter)
        assert json.loads(seen.payload)["error"]["code"] == "mqtt.not_authorised"
        [letter] = device.spool.dead_letters()
        assert letter.payload == b"decision"
        wait_until(lambda: device.spool.counts().outbox == 0)
        assert device.spool.counts().dropped == {"mqtt.not_authorised": 1}
    finally:
        strict.stop()


def test_refused_credentials_have_their_own_code_and_are_logged_once(
    node: MakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = mosquitto(tmp_path, anonymous=False)
    strict.start()
    try:
        device = node(strict.port, username="edge", password="wrong", reconnect_max_s=0.05)
        device.start()
        wait_until(lambda: device.uplink.fault == "mqtt.auth_refused")
        wait_until(lambda: device.wills > 5)
        printed = capsys.readouterr()
        assert (printed.out + printed.err).count("mqtt.auth_refused") <= 2  # the code and the error of one record
        with pytest.raises(TransientError) as caught:
            check_broker(device.settings, TOPICS)
        assert caught.value.code == "mqtt.auth_refused"
    finally:
        strict.stop()


def test_a_closed_port_a_bad_host_and_a_missing_password_file_have_codes_of_their_own(tmp_path: Path) -> None:
    def code_of(**settings: object) -> str:
        with pytest.raises(TransientError) as caught:
            check_broker(MqttSettings.model_validate({"host": "127.0.0.1", "connect_timeout_s": 1, **settings}), TOPICS)
        return caught.value.code

    assert code_of(port=free_port()) == "mqtt.port_closed"
    assert code_of(host="no-such-host.invalid") == "mqtt.bad_host"
    assert code_of(username="x", password_file=str(tmp_path / "absent")) == "mqtt.password_file"
    assert code_of(tls=True, ca_file=str(tmp_path / "absent.pem")) == "mqtt.tls_files"


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_against_a_plain_port_is_a_tls_fault(broker: BrokerProcess) -> None:
    settings = MqttSettings(host="127.0.0.1", port=broker.port, tls=True, connect_timeout_s=1)
    with pytest.raises(TransientError) as caught:
        check_broker(settings, TOPICS)
    assert caught.value.code == "mqtt.tls_failed"
    del caught
    gc.collect()


def test_a_server_that_accepts_and_says_nothing_is_given_up(proxy: MakeProxy, broker: BrokerProcess) -> None:
    network = proxy(broker.port)
    network.swallow("up")
    with pytest.raises(TransientError) as caught:
        check_broker(MqttSettings(host="127.0.0.1", port=network.port, connect_timeout_s=0.5), TOPICS)
    assert caught.value.code == "mqtt.no_connack"


def test_the_doctor_does_not_disturb_the_running_session(broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    device = node(broker.port)
    device.start()
    reader = peer(broker.port, TOPICS.status)
    reader.on(TOPICS.status)
    facts = check_broker(device.settings, TOPICS)
    assert facts.protocol == "5"
    assert facts.receive_maximum >= 1
    assert device.uplink.connected
    assert states(reader) == ["online"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_broker_that_hangs_up_before_it_answers_costs_no_descriptors(
    broker: BrokerProcess, node: MakeNode, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    network.refuse()
    device = node(network.port, protocol="5", reconnect_max_s=0.02)
    device.start()
    wait_until(lambda: device.wills >= 3)
    gc.collect()
    gc.disable()
    try:
        before = descriptors()
        wait_until(lambda: device.wills >= 23)
        assert descriptors() <= before + 6  # of the attempt under way, on both sides of the proxy
    finally:
        gc.enable()
    assert device.uplink.fault == "mqtt.closed_early"


def test_reconnecting_leaks_neither_threads_nor_descriptors(
    broker: BrokerProcess, node: MakeNode, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port, reconnect_max_s=0.02)
    device.start()
    wait_until(lambda: device.uplink.connected)

    def has_connected(wills: int) -> bool:
        return device.wills >= wills and device.uplink.connected

    def reconnect(times: int) -> None:
        for _ in range(times):
            wanted = device.wills + 1
            network.cut()
            wait_until(functools.partial(has_connected, wanted))

    reconnect(3)
    gc.collect()
    gc.disable()
    try:
        before, threads = descriptors(), threading.active_count()
        reconnect(10)
        # The proxy's own sockets come and go a moment later; the broker's are in another process.
        wait_until(lambda: descriptors() <= before + 2)
        wait_until(lambda: threading.active_count() <= threads + 1)
    finally:
        gc.enable()


def test_answers_reach_their_port_and_retained_ones_do_not(
    broker: BrokerProcess, tmp_path: Path, peer: MakePeer
) -> None:
    reader = peer(broker.port, TOPICS.status)
    old = TOPICS.escalation_answer("triage", "0" * 32)
    reader.deliver(old, b"retained before the first subscription", retain=True)
    settings = MqttSettings(host="127.0.0.1", port=broker.port, protocol="3.1.1")  # which replays what is retained
    device = Node(tmp_path, settings, takes_answers=True)
    device.start()
    reader.on(TOPICS.status)
    reader.deliver(TOPICS.escalation_answer("triage", "1" * 32), b"an answer")
    reader.deliver(f"{TOPICS.base}/escalations-answers/triage/too/deep", b"not subscribed")
    wait_until(lambda: device.answers)
    wait_until(lambda: device.spool.counts().dropped == {"escalation.answer_retained": 1})
    assert device.answers == [("triage", "1" * 32, b"an answer")]
    device.stop()


def test_a_node_that_takes_no_answers_does_not_subscribe_to_them(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    reader = peer(broker.port, TOPICS.status, DECISIONS)
    device = node(broker.port)
    device.start()
    device.work()
    reader.on(TOPICS.status)
    reader.deliver(TOPICS.escalation_answer("triage", "1" * 32), b"an answer")
    reader.deliver(EVENTS, event(1))
    reader.on(DECISIONS)
    assert device.answers == []
