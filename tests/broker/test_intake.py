"""What comes in from a real mosquitto: events of every kind, desired states, answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.settings import MqttSettings, SpoolSettings
from tests.fakes.brokers import BrokerProcess
from tests.fakes.mqtt_peer import MakePeer, wait_until
from tests.fakes.node import DECISIONS, EVENTS, TOPICS, MakeNode, Node, event

pytestmark = pytest.mark.needs("mosquitto")


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
