from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest

from edge_agent.contract.event import MAX_EVENT_BYTES
from edge_agent.contract.messages import DeadLetter, now_ms
from edge_agent.errors import PermanentError, RefusedError, TransientError
from edge_agent.uplink.records import Accepted, Duplicate, OutboundMessage
from edge_agent.uplink.spool import Spool
from edge_agent.uplink.spool_rows import CLOCK_FLOOR_MS
from tests.unit.uplink.conftest import DEADLETTER, STUCK, answer, make_spool, put


def test_safety_events_are_served_before_older_events_of_lower_lanes(spool: Spool) -> None:
    put(spool, "a", "bulk")
    put(spool, "b", "normal")
    put(spool, "c", "safety")
    put(spool, "d", "safety")
    served = []
    while (event := spool.next_event()) is not None:
        served.append(event.event_id)
        spool.complete(event.inbox_id, [])
    assert served == ["c", "d", "b", "a"]


def test_an_id_that_waits_is_a_duplicate(spool: Spool) -> None:
    assert put(spool, "a") is Accepted
    assert put(spool, "a") is Duplicate
    assert spool.counts().inbox == 1
    assert spool.counts().dropped == {"event.duplicate": 1}


def test_an_id_that_was_answered_is_a_duplicate_also_after_a_restart(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    put(spool, "a")
    event = spool.next_event()
    assert event is not None
    spool.complete(event.inbox_id, [answer("a")])
    spool.close()
    again = make_spool(tmp_path / "spool.sqlite")
    assert put(again, "a") is Duplicate
    assert len(again.pending(10)) == 1


def test_one_event_for_two_tasks_is_two_events(spool: Spool) -> None:
    assert put(spool, "a", task="triage") is Accepted
    assert put(spool, "a", task="diagnose") is Accepted


def test_the_memory_of_answered_ids_is_bounded(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", answered_ids_max=3)
    for number in range(5):
        put(spool, str(number))
        event = spool.next_event()
        assert event is not None
        spool.complete(event.inbox_id, [])
    assert [put(spool, str(number)) for number in range(5)] == [Accepted, Accepted, Duplicate, Duplicate, Duplicate]


def test_completing_twice_answers_once(spool: Spool) -> None:
    put(spool, "a")
    event = spool.next_event()
    assert event is not None
    assert spool.complete(event.inbox_id, [answer("a")])
    assert not spool.complete(event.inbox_id, [answer("a")])
    assert spool.bury(event.inbox_id, PermanentError("x.y", "late")) is None
    assert len(spool.pending(10)) == 1


def test_a_leased_event_is_not_handed_out_twice_and_comes_back_when_released(spool: Spool) -> None:
    put(spool, "a")
    event = spool.next_event()
    assert event is not None
    assert spool.next_event() is None
    spool.release(event.inbox_id)
    assert spool.next_event() == event


def test_a_full_inbox_gives_up_its_oldest_lowest_event_for_a_safety_event(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", inbox_max_events=3)
    put(spool, "normal-1", "normal")
    put(spool, "bulk-1", "bulk")
    put(spool, "bulk-2", "bulk")
    assert put(spool, "stop", "safety") is Accepted
    [letter] = spool.dead_letters()
    assert (letter.event_id, letter.code) == ("bulk-1", "inbox.displaced")
    [message] = spool.pending(10)
    assert message.message.topic == DEADLETTER
    assert DeadLetter.model_validate_json(message.message.payload).error.code == "inbox.displaced"
    assert spool.counts().dropped == {"inbox.displaced": 1}


def test_a_full_inbox_refuses_an_event_of_the_lowest_lane(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", inbox_max_events=2)
    put(spool, "a")
    put(spool, "b")
    with pytest.raises(TransientError) as caught:
        put(spool, "c")
    assert caught.value.code == "inbox.full"
    assert spool.counts().inbox == 2
    # Whether it is dropped is for the caller to say.
    assert spool.counts().dropped == {}
    spool.bury(None, caught.value, task="triage", payload=b"{}")
    assert spool.counts().dropped == {"inbox.full": 1}


def test_an_event_in_work_is_not_displaced(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", inbox_max_events=1)
    put(spool, "working", "bulk")
    event = spool.next_event()
    assert event is not None
    with pytest.raises(TransientError):
        put(spool, "stop", "safety")
    assert spool.complete(event.inbox_id, [])


def test_a_displaced_event_may_be_sent_again(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", inbox_max_events=1)
    put(spool, "a", "bulk")
    put(spool, "b", "safety")
    event = spool.next_event()
    assert event is not None
    spool.complete(event.inbox_id, [])
    assert put(spool, "a", "bulk") is Accepted


def test_an_event_over_which_the_worker_died_twice_is_buried_as_poison(spool: Spool) -> None:
    put(spool, "poison")
    put(spool, "harmless")
    outcomes = []
    for _ in range(2):
        event = spool.next_event()
        assert event is not None
        assert event.event_id == "poison"
        outcomes.append(spool.worker_died(event.inbox_id, STUCK))
    assert outcomes == [False, True]
    event = spool.next_event()
    assert event is not None
    assert event.event_id == "harmless"
    (letter,) = spool.dead_letters()
    assert letter.code == "event.poison"
    assert "worker.stuck: killed" in letter.detail, "what it was that the event did"
    assert put(spool, "poison") is Duplicate


def test_attempts_survive_a_restart(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    put(spool, "poison")
    event = spool.next_event()
    assert event is not None
    spool.worker_died(event.inbox_id, STUCK)
    spool.close()
    again = make_spool(tmp_path / "spool.sqlite")
    event = again.next_event()
    assert event is not None
    assert event.attempts == 1
    assert again.worker_died(event.inbox_id, STUCK)


def test_dead_letters_are_bounded_and_the_trimming_is_counted(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", dead_letters_max=2)
    for number in range(5):
        spool.bury(None, RefusedError("event.not_json", "no"), task="triage", payload=str(number).encode())
    assert [letter.payload for letter in spool.dead_letters()] == [b"4", b"3"]
    assert spool.counts().dead_letters == 2
    assert spool.counts().dropped == {"deadletter.trimmed": 3, "event.not_json": 5}


def test_a_huge_payload_is_buried_without_its_content(spool: Spool) -> None:
    spool.bury(None, RefusedError("event.too_large", "big"), task="triage", payload=b"x" * (MAX_EVENT_BYTES + 1))
    assert spool.dead_letters()[0].payload is None


def test_a_requeued_dead_letter_is_decided_even_though_its_id_was_answered(spool: Spool) -> None:
    put(spool, "a", "safety")
    event = spool.next_event()
    assert event is not None
    spool.bury(event.inbox_id, PermanentError("worker.deadline", "too slow"))
    assert put(spool, "a", "safety") is Duplicate
    assert spool.requeue(spool.dead_letters()[0].dead_letter_id) is Accepted
    assert spool.dead_letters() == []
    event = spool.next_event()
    assert event is not None
    assert (event.event_id, event.priority, event.attempts) == ("a", "safety", 0)


def test_a_dead_letter_stays_when_there_is_no_room_to_requeue_it(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", inbox_max_events=1)
    spool.bury(None, RefusedError("event.not_json", "no"), task="triage", event_id="a", payload=b"{")
    put(spool, "b")
    with pytest.raises(TransientError):
        spool.requeue(1)
    assert len(spool.dead_letters()) == 1


def test_what_has_no_content_cannot_be_requeued(spool: Spool) -> None:
    spool.bury(None, RefusedError("event.too_large", "big"), task="triage", payload=None)
    with pytest.raises(RefusedError) as caught:
        spool.requeue(1)
    assert caught.value.code == "deadletter.no_content"
    with pytest.raises(RefusedError) as caught:
        spool.requeue(99)
    assert caught.value.code == "deadletter.unknown"


def test_ids_that_utf8_cannot_carry_are_kept_apart_and_found_again(spool: Spool) -> None:
    ids = ["lone-\ud800", "lone-\ud801", "nul-\0", "quote-'", "emoji-😀", "long-" + "x" * 5000]
    for event_id in ids:
        assert put(spool, event_id) is Accepted
        assert put(spool, event_id) is Duplicate
    while (event := spool.next_event()) is not None:
        spool.bury(event.inbox_id, RefusedError("event.bad_field", "bad \udfff"))
    assert spool.counts().inbox == 0


def test_a_full_outbox_drops_telemetry_before_alarms_before_decisions(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", outbox_max_bytes=1200)
    for klass in ("decision", "alarm", "telemetry", "decision"):
        spool.enqueue(answer(klass, klass, size=300))
    assert [m.message.klass for m in spool.pending(10)] == ["decision", "alarm", "decision"]
    spool.enqueue(answer("new", "decision", size=300))
    assert [m.message.klass for m in spool.pending(10)] == ["decision", "decision", "decision"]
    spool.enqueue(answer("newer", "decision", size=300))
    assert [m.class_seq for m in spool.pending(10)] == [2, 3, 4]
    assert spool.counts().dropped == {"outbox.full.alarm": 1, "outbox.full.decision": 1, "outbox.full.telemetry": 1}


def test_sequence_numbers_show_a_gap_where_a_message_was_dropped_and_survive_a_restart(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    for number in range(3):
        spool.enqueue(answer(str(number)))
    spool.delete(m.seq for m in spool.pending(10))
    spool.close()
    again = make_spool(tmp_path / "spool.sqlite")
    again.enqueue(answer("3"))
    assert [m.class_seq for m in again.pending(10)] == [4]


def test_old_messages_expire_by_class_but_not_those_written_before_the_clock_was_set(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    spool.enqueue(answer("a", "decision"))
    spool.enqueue(answer("b", "telemetry"))
    spool.enqueue(answer("c", "decision"))
    with sqlite3.connect(tmp_path / "spool.sqlite") as other:
        other.execute("UPDATE outbox SET queued_ms = ? WHERE seq = 3", (CLOCK_FLOOR_MS - 1,))
    other.close()
    two_hours_on = now_ms() + 2 * 3600 * 1000
    assert spool.expire(two_hours_on, steady_ms=steady_ms(2)) == 1
    assert spool.expire(two_hours_on + 8 * 24 * 3600 * 1000, steady_ms=steady_ms(2 + 8 * 24)) == 1
    assert [m.seq for m in spool.pending(10)] == [3]
    assert spool.counts().dropped == {"outbox.expired.decision": 1, "outbox.expired.telemetry": 1}


def steady_ms(hours_on: float) -> int:
    """The monotonic clock so many hours from now."""
    return round((time.monotonic() + hours_on * 3600) * 1000)


def test_a_clock_set_forward_after_a_long_power_cut_drops_no_decision_made_since(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    spool.enqueue(OutboundMessage("decisions", b"before the power cut"))
    spool.close()
    spool = make_spool(tmp_path / "spool.sqlite")
    spool.enqueue(OutboundMessage("decisions", b"after it"))
    two_weeks_on = now_ms() + 14 * 24 * 3600 * 1000
    assert spool.expire(two_weeks_on, steady_ms=steady_ms(0)) == 1
    assert [queued.message.payload for queued in spool.pending(10)] == [b"after it"]
    assert spool.expire(two_weeks_on + 6 * 24 * 3600 * 1000, steady_ms=steady_ms(6 * 24)) == 0
    assert spool.expire(two_weeks_on + 8 * 24 * 3600 * 1000, steady_ms=steady_ms(8 * 24)) == 1, "it has its own age"


def test_a_message_the_broker_never_takes_becomes_a_dead_letter_that_cannot_be_requeued(spool: Spool) -> None:
    spool.enqueue(answer("a"))
    spool.drop(1, PermanentError("mqtt.not_authorised", "no"))
    [letter] = spool.dead_letters()
    assert (letter.code, letter.task, (letter.payload or b"")[:1]) == ("mqtt.not_authorised", None, b"a")
    with pytest.raises(RefusedError):
        spool.requeue(letter.dead_letter_id)
    # Its announcement is refused as well: that is the end of it.
    [announcement] = spool.pending(10)
    spool.drop(announcement.seq, PermanentError("mqtt.not_authorised", "no"))
    assert spool.pending(10) == []
    assert spool.counts().dropped == {"mqtt.not_authorised": 2}


def test_a_batch_is_one_commit_and_an_error_takes_all_of_it_back(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    with spool.batch():
        put(spool, "a")
        put(spool, "b")
        with sqlite3.connect(tmp_path / "spool.sqlite") as other:
            assert other.execute("SELECT count(*) FROM inbox").fetchone() == (0,)
        other.close()
    assert spool.counts().inbox == 2

    def fail_halfway() -> None:
        with spool.batch():
            put(spool, "c")
            raise TransientError("disk.full", "later")

    with pytest.raises(TransientError):
        fail_halfway()
    assert spool.counts().inbox == 2
    assert put(spool, "c") is Accepted


def test_a_full_inbox_inside_a_batch_costs_only_that_event(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite", inbox_max_events=1)
    with spool.batch():
        put(spool, "a")
        with pytest.raises(TransientError):
            put(spool, "b")
    assert spool.counts().inbox == 1


def test_many_threads_share_one_spool(spool: Spool) -> None:
    answered: list[str] = []
    done = threading.Event()

    def accept(prefix: str) -> None:
        for number in range(100):
            put(spool, f"{prefix}-{number % 80}")

    def work() -> None:
        while not done.is_set() or spool.counts().inbox:
            event = spool.next_event()
            if event is None:
                spool.inbox_changed.wait(0.01)
                continue
            if spool.complete(event.inbox_id, [answer(event.event_id)]):
                answered.append(event.event_id)

    workers = [threading.Thread(target=work) for _ in range(2)]
    senders = [threading.Thread(target=accept, args=(name,)) for name in "abc"]
    for thread in [*workers, *senders]:
        thread.start()
    for thread in senders:
        thread.join()
    done.set()
    for thread in workers:
        thread.join()
    assert len(answered) == len(set(answered)) == 240
    assert spool.counts().dropped == {"event.duplicate": 60}
