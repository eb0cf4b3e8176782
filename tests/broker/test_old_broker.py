"""A broker that speaks MQTT 3.1.1 only: the embedded broker of the demo."""

from __future__ import annotations

import json

import pytest

from edge_agent.uplink.broker_check import check_broker
from edge_agent.uplink.records import OutboundMessage
from tests.fakes.brokers import BrokerProcess
from tests.fakes.mqtt_peer import MakePeer, wait_until
from tests.fakes.node import DECISIONS, TOPICS, MakeNode, decision_of

pytestmark = pytest.mark.needs("module:amqtt")


def test_the_uplink_falls_back_and_decisions_become_structured_cloudevents(
    old_broker: BrokerProcess, node: MakeNode, peer: MakePeer
) -> None:
    reader = peer(old_broker.port, DECISIONS, TOPICS.status, is_v5=False)
    device = node(old_broker.port)
    device.start()
    device.work()
    reader.on(TOPICS.status)
    reader.send(TOPICS.events("triage"), json.dumps({"id": "7", "code": "E217"}))
    [seen] = reader.on(DECISIONS)
    envelope = json.loads(seen.payload)
    data = envelope.pop("data")
    assert data["event_id"] == "7"
    assert envelope.pop("time").endswith("Z")
    assert envelope == {
        "specversion": "1.0",
        "id": decision_of("triage", "7").decision_id,
        "source": "edge/v1/plant1/press-4",
        "type": "io.edge-agent.decision.v1",
        "subject": "7",
        "sequence": "000000000001",
        "datacontenttype": "application/json",
    }
    wait_until(lambda: device.spool.counts().outbox == 0)


def test_many_messages_pass_in_order(old_broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    reader = peer(old_broker.port, DECISIONS, is_v5=False)
    device = node(old_broker.port)
    for number in range(100):
        device.spool.enqueue(OutboundMessage(DECISIONS, str(number).encode()))
    device.start()
    assert [int(seen.payload) for seen in reader.on(DECISIONS, 100)] == list(range(100))


def test_a_restarted_broker_is_found_again(old_broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    device = node(old_broker.port)
    device.start()
    wait_until(lambda: device.uplink.connected)
    old_broker.stop()
    wait_until(lambda: not device.uplink.connected)
    device.spool.enqueue(OutboundMessage(DECISIONS, b"kept"))
    old_broker.start()
    wait_until(lambda: device.uplink.connected)
    wait_until(lambda: device.spool.counts().outbox == 0)


def test_the_doctor_names_the_protocol(old_broker: BrokerProcess, node: MakeNode) -> None:
    assert check_broker(node(old_broker.port).settings, TOPICS).protocol == "3.1.1"
