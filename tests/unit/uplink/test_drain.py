from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.connection import Connack
from edge_agent.uplink.drain import Drain
from edge_agent.uplink.records import OutboundMessage
from edge_agent.uplink.spool import Spool
from tests.fakes.memory_outlet import MemoryOutlet

FAST = 1e9
CONNACK = Connack(session_present=True, is_v5=True, receive_maximum=1000, max_packet_bytes=None)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "spool.sqlite", SpoolSettings(), deadletter_topic="node/deadletter")
    yield opened
    opened.close()


def fill(spool: Spool, count: int, topic: str = "out", qos: int = 1) -> None:
    with spool.batch():
        for number in range(count):
            spool.enqueue(OutboundMessage(topic, str(number).encode(), qos=qos))


class Clock:
    """Every look at it takes a microsecond."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


def begun(
    spool: Spool, rate: float = FAST, window: int = 20, connack: Connack = CONNACK, clock: Clock | None = None
) -> Drain:
    drain = Drain(spool, rate, window, clock=clock or Clock())
    drain.begin(connack)
    return drain


def test_no_more_than_the_window_is_unacknowledged(spool: Spool) -> None:
    fill(spool, 10)
    drain, outlet = begun(spool, window=4), MemoryOutlet()
    drain.step(outlet)
    drain.step(outlet)
    assert outlet.payloads() == [b"0", b"1", b"2", b"3"]
    outlet.answer(count=2)
    drain.step(outlet)
    assert outlet.payloads() == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_the_receive_maximum_of_the_broker_bounds_the_window(spool: Spool) -> None:
    fill(spool, 10)
    strict = Connack(session_present=True, is_v5=True, receive_maximum=3, max_packet_bytes=None)
    drain, outlet = begun(spool, connack=strict), MemoryOutlet()
    drain.step(outlet)
    assert len(outlet.sent) == 3


def test_a_row_is_deleted_by_a_good_puback_and_by_nothing_else(spool: Spool) -> None:
    fill(spool, 3)
    drain, outlet = begun(spool), MemoryOutlet()
    drain.step(outlet)
    assert spool.counts().outbox == 3
    outlet.answer(count=1)
    drain.step(outlet)
    assert [m.seq for m in spool.pending(10)] == [2, 3]
    outlet.answer(0x10)  # no matching subscribers: taken all the same
    drain.step(outlet)
    assert drain.is_idle


def test_a_new_connection_sends_again_what_was_not_acknowledged_and_only_that(spool: Spool) -> None:
    fill(spool, 3)
    drain, outlet = begun(spool), MemoryOutlet()
    drain.step(outlet)
    outlet.answer(count=1)
    drain.step(outlet)
    drain.begin(CONNACK)
    again = MemoryOutlet()
    drain.step(again)
    assert again.payloads() == [b"1", b"2"]


def test_a_lost_connection_is_reported_and_keeps_the_outbox(spool: Spool) -> None:
    fill(spool, 2)
    drain, outlet = begun(spool), MemoryOutlet()
    outlet.is_lost = True
    with pytest.raises(TransientError):
        drain.step(outlet)
    assert spool.counts().outbox == 2


def test_an_exhausted_quota_pauses_ever_longer_and_then_sends_the_same_message_again(spool: Spool) -> None:
    fill(spool, 2)
    clock = Clock()
    drain, outlet = begun(spool, window=1, clock=clock), MemoryOutlet()
    drain.step(outlet)
    for longest_s in (1.0, 2.0, 4.0):
        outlet.answer(0x97)
        pause_s = drain.step(outlet)
        assert longest_s / 2 <= pause_s <= longest_s
        clock.now_s += pause_s - 0.01
        sent = len(outlet.sent)
        drain.step(outlet)
        assert len(outlet.sent) == sent
        clock.now_s += 0.02
        drain.step(outlet)
        assert len(outlet.sent) == sent + 1
    outlet.answer()
    drain.step(outlet)
    assert outlet.payloads() == [b"0", b"0", b"0", b"0", b"1"]
    assert spool.counts().dropped == {}


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (0x87, "mqtt.not_authorised"),
        (0x90, "mqtt.topic_refused"),
        (0x99, "mqtt.payload_refused"),
        (0x9E, "mqtt.publish_refused"),
    ],
)
def test_a_final_refusal_buries_the_message_and_the_next_one_goes(spool: Spool, reason: int, code: str) -> None:
    fill(spool, 2)
    drain, outlet = begun(spool, window=1), MemoryOutlet()
    drain.step(outlet)
    outlet.answer(reason)
    drain.step(outlet)
    assert outlet.payloads() == [b"0", b"1"]
    [letter] = spool.dead_letters()
    assert (letter.code, letter.payload) == (code, b"0")
    assert spool.counts().dropped == {code: 1}


def test_a_refused_announcement_of_a_refusal_is_the_end_of_it(spool: Spool) -> None:
    fill(spool, 1)
    drain, outlet = begun(spool), MemoryOutlet()
    for _ in range(5):
        drain.step(outlet)
        outlet.answer(0x87)
    drain.step(outlet)
    assert len(outlet.sent) == 2
    assert drain.is_idle


def test_a_topic_that_is_none_is_buried_without_asking_the_broker(spool: Spool) -> None:
    fill(spool, 1, topic="plant/#")
    fill(spool, 1)
    drain, outlet = begun(spool), MemoryOutlet()
    drain.step(outlet)
    assert outlet.payloads()[0] == b"0"
    assert spool.dead_letters()[0].code == "mqtt.topic_refused"


def test_the_outbox_drains_no_faster_than_configured(spool: Spool) -> None:
    fill(spool, 200)
    clock = Clock()
    drain, outlet = begun(spool, rate=100.0, window=10, clock=clock), MemoryOutlet()
    drain.step(outlet)
    # A window full at once, then the rate.
    assert len(outlet.sent) == 10
    for _ in range(50):
        outlet.answer()
        clock.now_s += 0.01
        drain.step(outlet)
    assert 55 <= len(outlet.sent) <= 60


def test_retained_state_goes_before_the_outbox_and_only_in_its_latest_form(spool: Spool) -> None:
    fill(spool, 1)
    drain, outlet = begun(spool), MemoryOutlet()
    drain.offer("status", b"draining")
    drain.offer("status", b"offline")
    drain.step(outlet)
    assert outlet.payloads() == [b"offline", b"0"]
    assert (outlet.sent[0].retain, outlet.sent[1].retain) == (True, False)


def test_a_newer_state_set_while_the_older_is_under_way_is_sent_after_it(spool: Spool) -> None:
    drain, outlet = begun(spool), MemoryOutlet()
    drain.offer("status", b"online")
    drain.step(outlet)
    drain.offer("status", b"draining")
    outlet.answer(count=1)
    drain.step(outlet)
    drain.step(outlet)
    assert outlet.payloads() == [b"online", b"draining"]
    assert not drain.is_idle
    outlet.answer()
    drain.step(outlet)
    assert drain.is_idle


def test_unacknowledged_state_is_sent_again_on_a_new_connection(spool: Spool) -> None:
    drain, outlet = begun(spool), MemoryOutlet()
    drain.offer("status", b"online")
    drain.step(outlet)
    drain.begin(CONNACK)
    again = MemoryOutlet()
    drain.step(again)
    assert again.payloads() == [b"online"]


def test_a_message_without_guarantee_is_gone_once_sent(spool: Spool) -> None:
    fill(spool, 1, qos=0)
    drain, outlet = begun(spool), MemoryOutlet()
    drain.step(outlet)
    drain.step(outlet)
    assert drain.is_idle
    assert len(outlet.sent) == 1
