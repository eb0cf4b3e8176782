"""What a node sends, against a real mosquitto: nothing is lost, and all of it comes in order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.contract.messages import Decision
from edge_agent.uplink.records import OutboundMessage
from tests.fakes.brokers import BrokerProcess, mosquitto
from tests.fakes.cut_proxy import MakeProxy
from tests.fakes.mqtt_peer import MakePeer, wait_until
from tests.fakes.node import DECISIONS, EVENTS, TOPICS, MakeNode, decision_of, event, states

pytestmark = pytest.mark.needs("mosquitto")


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
