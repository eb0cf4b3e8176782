"""Every pending escalation comes to exactly one end, whatever the server, the disk and the clock do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from edge_agent.contract.messages import Decision
from edge_agent.errors import EdgeError, PermanentError, TransientError
from edge_agent.escalation.chat import ChatEndpoint
from edge_agent.escalation.escalator import PATIENCE_MAX_S, Escalator
from edge_agent.escalation.ports import Asker, Case
from edge_agent.escalation.rules import MAX_POWER_CUTS
from edge_agent.settings import EscalationSettings
from tests.fakes.chat_server import ChatServer, Turn
from tests.fakes.escalations import EVENT, GOOD, GUESS, FakeClock, MemoryStore, case_of, guess_of, task_of
from tests.fakes.mqtt_peer import wait_until

PLAIN = json.dumps(GOOD)
BUSY = TransientError("escalation.busy", "later", retry_after_s=0.01)


class ScriptedAsker:
    """Answers as told, in turn; the last word is repeated."""

    def __init__(self, *script: str | EdgeError) -> None:
        self._script = list(script)
        self.asked: list[Case] = []
        self.most_at_a_time = 0
        self.gate = threading.Event()
        self.gate.set()
        self._at_a_time = 0
        self._lock = threading.Lock()

    def ask(self, case: Case, timeout_s: float) -> str:
        with self._lock:
            self.asked.append(case)
            self._at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
            word = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        self.gate.wait(20)
        with self._lock:
            self._at_a_time -= 1
        if isinstance(word, EdgeError):
            raise word
        return word

    def abort(self) -> None:
        self.gate.set()


class Bench:
    def __init__(self, store: MemoryStore, asker: Asker | None, **settings: Any) -> None:
        self.store = store
        self.clock = FakeClock()
        self.faults: list[EdgeError | None] = []
        section = EscalationSettings.model_validate({"mqtt": True, **settings})
        self.escalator = Escalator(section, store, asker, self.clock, self.faults.append)

    def ends(self, count: int = 1) -> list[Decision]:
        wait_until(lambda: len(self.store.published) >= count)
        return self.store.published

    def outcomes(self, count: int = 1) -> list[tuple[str, str, str | None]]:
        ended = [(d.route, d.escalation) for d in self.ends(count)]
        return [(route, e.outcome, e.reason) for route, e in ended if e is not None]


Running = Callable[..., AbstractContextManager[Bench]]


@pytest.fixture
def running() -> Running:
    @contextmanager
    def run(store: MemoryStore, asker: Asker | None, **settings: Any) -> Iterator[Bench]:
        bench = Bench(store, asker, **settings)
        bench.escalator.start()
        try:
            yield bench
        finally:
            bench.escalator.stop()

    return run


def test_an_answer_becomes_one_escalated_decision_under_the_same_id(running: Running) -> None:
    with running(MemoryStore(case_of()), ScriptedAsker(PLAIN)) as bench:
        [decision] = bench.ends()
        assert (decision.route, decision.decision) == ("escalated", GOOD)
        assert decision.decision_id == guess_of("e-1").decision_id
        assert decision.escalation is not None
        assert (decision.escalation.to, decision.escalation.outcome) == ("http", "answered")
        assert decision.escalation.latency_ms == 0.0
        assert bench.store.attempts == {1: 1}


@pytest.mark.parametrize(
    ("script", "route", "outcome", "reason"),
    [
        ([BUSY, BUSY, PLAIN], "escalated", "answered", None),
        (["I do not know"], "abstained", "rejected", "escalation.answer_not_json"),
        ([json.dumps({**GOOD, "stop": 1})], "abstained", "rejected", "escalation.answer_outside_schema"),
        ([PermanentError("escalation.denied", "no")], "abstained", "failed", "escalation.denied"),
        ([PermanentError("escalation.http_error", "no")], "abstained", "failed", "escalation.http_error"),
        (
            [TransientError("escalation.busy", "come next week", retry_after_s=604_800)],
            "abstained",
            "timed_out",
            "escalation.busy",
        ),
    ],
)
def test_how_an_escalation_ends(
    running: Running, script: list[str | EdgeError], route: str, outcome: str, reason: str | None
) -> None:
    with running(MemoryStore(case_of()), ScriptedAsker(*script)) as bench:
        assert bench.outcomes() == [(route, outcome, reason)]
        assert bench.store.attempts == {1: len(script)}
        assert not bench.store.cases


def test_a_server_that_stays_away_costs_the_best_guess_at_the_deadline_and_not_before(running: Running) -> None:
    down = TransientError("escalation.unreachable", "down", retry_after_s=0.01)
    with running(MemoryStore(case_of(timeout_ms=20_000)), ScriptedAsker(down)) as bench:
        wait_until(lambda: bench.store.attempts[1] >= 3)
        assert not bench.store.published
        bench.clock.pass_ms(20_000)
        bench.escalator.wake()
        assert bench.outcomes()[0][:2] == ("abstained", "timed_out")
        assert bench.store.published[0].decision == GUESS


def test_an_answer_after_the_fallback_is_counted_and_published_nowhere(running: Running) -> None:
    asker = ScriptedAsker(PLAIN)
    asker.gate.clear()
    with running(MemoryStore(case_of()), asker) as bench:
        wait_until(lambda: asker.asked)
        bench.clock.pass_ms(30_000)
        bench.escalator.wake()
        assert bench.outcomes() == [("abstained", "timed_out", None)]
        asker.gate.set()
        wait_until(lambda: bench.store.counted)
        assert bench.store.counted == {"escalation.answer_late": 1}
        assert len(bench.store.published) == 1


def test_no_more_questions_are_put_at_a_time_than_the_site_allows(running: Running) -> None:
    asker = ScriptedAsker(PLAIN)
    asker.gate.clear()
    store = MemoryStore(*(case_of(number) for number in range(1, 13)))
    with running(store, asker, concurrency=3) as bench:
        wait_until(lambda: len(asker.asked) == 3)
        for _ in range(5):
            bench.escalator.look()
        assert len(asker.asked) == 3
        asker.gate.set()
        bench.ends(12)
        assert asker.most_at_a_time == 3
        assert len(asker.asked) == 12, "none is asked twice"


def test_a_server_that_wants_patience_is_not_asked_the_next_question_either_until_it_is_over(running: Running) -> None:
    asker = ScriptedAsker(TransientError("escalation.busy", "later", retry_after_s=1e9), PLAIN)
    store = MemoryStore(case_of(1), case_of(2, timeout_ms=3_600_000))
    with running(store, asker, concurrency=1) as bench:
        assert bench.outcomes() == [("abstained", "timed_out", "escalation.busy")], "it has no time for that"
        for _ in range(20):
            bench.escalator.look()
        assert len(asker.asked) == 1
        bench.clock.pass_ms(PATIENCE_MAX_S * 1000)
        bench.escalator.wake()
        assert bench.outcomes(2)[1] == ("escalated", "answered", None), "an absurd wish is cut"


def test_one_that_nobody_had_time_to_ask_ends_at_its_own_deadline(running: Running) -> None:
    asker = ScriptedAsker(PLAIN)
    asker.gate.clear()
    with running(MemoryStore(case_of(1, timeout_ms=60_000), case_of(2)), asker, concurrency=1) as bench:
        wait_until(lambda: asker.asked)
        bench.clock.pass_ms(30_000)
        bench.escalator.wake()
        assert bench.outcomes() == [("abstained", "timed_out", None)]
        assert list(bench.store.cases) == [1]
        assert bench.store.attempts == {1: 1}


def test_a_full_disk_delays_an_answer_and_does_not_lose_it(running: Running) -> None:
    asker = ScriptedAsker(PLAIN)
    asker.gate.clear()
    with running(MemoryStore(case_of()), asker) as bench:
        wait_until(lambda: asker.asked)
        bench.store.fault = TransientError("disk.full", "no room")
        asker.gate.set()
        wait_until(lambda: bench.faults, 5.0)  # the answer has come: the server is well
        bench.store.fault = None
        assert bench.outcomes() == [("escalated", "answered", None)]
        assert len(asker.asked) == 1, "the answer was paid for once"


def test_a_question_is_not_put_before_it_is_recorded(running: Running) -> None:
    asker = ScriptedAsker(PLAIN)
    store = MemoryStore(case_of())
    store.fault = TransientError("disk.full", "no room", retry_after_s=0.01)
    with running(store, asker) as bench:
        for _ in range(20):
            bench.escalator.look()
        assert not asker.asked
        store.fault = None
        bench.ends()


def test_a_damaged_escalation_does_not_hold_up_the_others(running: Running) -> None:
    class Damaged(MemoryStore):
        def case(self, escalation_id: int) -> Case | None:
            if escalation_id == 1:
                raise PermanentError("spool.corrupt", "unreadable")
            return super().case(escalation_id)

    with running(Damaged(case_of(1), case_of(2)), None) as bench:  # no server: both are to be closed
        assert bench.outcomes() == [("abstained", "not_configured", None)]


def test_a_stop_leaves_what_is_pending_to_the_next_start(running: Running) -> None:
    asker = ScriptedAsker(TransientError("escalation.unreachable", "aborted"))
    asker.gate.clear()
    store = MemoryStore(case_of())
    with running(store, asker):
        wait_until(lambda: asker.asked)
    assert not store.published
    with running(store, ScriptedAsker(PLAIN)) as again:
        assert again.outcomes() == [("escalated", "answered", None)]


def test_after_a_power_cut_the_wait_begins_anew_but_not_for_ever(running: Running) -> None:
    down = TransientError("escalation.unreachable", "down", retry_after_s=3600)
    store = MemoryStore(case_of(task=task_of(to="mqtt")))
    with running(store, ScriptedAsker(down)) as bench:
        for start in range(1, MAX_POWER_CUTS + 1):
            bench.clock.power_cut()
            bench.escalator.wake()
            wait_until(lambda start=start: store.cases[1].waiting.power_cuts == start)  # type: ignore[misc]
        bench.clock.power_cut()
        bench.escalator.wake()
        [decision] = bench.ends()
        assert decision.escalation is not None
        assert (decision.escalation.outcome, decision.escalation.latency_ms) == ("timed_out", None)


def test_what_waits_for_a_way_that_the_site_has_closed_falls_back(running: Running) -> None:
    store = MemoryStore(case_of(1), case_of(2, task=task_of(to="mqtt")))
    with running(store, None, mqtt=False) as bench:
        assert bench.outcomes(2) == [("abstained", "not_configured", None)] * 2


def test_a_fault_that_needs_a_person_raises_an_alarm_once_and_the_next_answer_clears_it(running: Running) -> None:
    with ChatServer(PLAIN) as server:
        section = EscalationSettings(base_url=server.url, model="large")
        server.next(Turn(status=403))
        store = MemoryStore(case_of(1), case_of(2))
        with running(store, ChatEndpoint(server.url, "large", section), concurrency=1) as bench:
            assert bench.outcomes(2) == [("abstained", "failed", "escalation.denied")] * 2
            assert len(server.asked) == 1
            assert [fault.code if fault else None for fault in bench.faults] == ["escalation.denied"]
        store.cases[3] = case_of(3)
        store.cases[4] = case_of(4)
        with running(store, ChatEndpoint(server.url, "large", section), concurrency=1) as bench:
            bench.ends(4)
            assert bench.faults == [None], "an alarm of an earlier life is cleared, once"


# ---- answers over MQTT


def message(decision: dict[str, Any] | None, **more: Any) -> bytes:
    return json.dumps({"schema_version": 1, "decision": decision, **more}).encode()


@pytest.fixture
def asked_over_mqtt() -> Bench:
    return Bench(MemoryStore(case_of(task=task_of(to="mqtt"))), None)


def take(bench: Bench, payload: bytes, *, task: str = "triage", decision_id: str | None = None) -> None:
    bench.escalator.take_answer(task, decision_id or guess_of("e-1").decision_id, payload)


def test_a_persons_answer_is_published_with_their_name(asked_over_mqtt: Bench) -> None:
    take(asked_over_mqtt, message(GOOD, answered_by="ann\x1b\n"))
    [decision] = asked_over_mqtt.store.published
    assert (decision.route, decision.decision) == ("escalated", GOOD)
    assert decision.escalation is not None
    assert decision.escalation.answered_by == "ann\ufffd\ufffd"
    decision.model_dump_json()


def test_a_person_who_does_not_know_ends_the_wait(asked_over_mqtt: Bench) -> None:
    take(asked_over_mqtt, message(None))
    assert asked_over_mqtt.outcomes() == [("abstained", "declined", None)]


def test_a_wrong_answer_is_counted_and_leaves_the_question_open_for_the_right_one(asked_over_mqtt: Bench) -> None:
    bench = asked_over_mqtt
    take(bench, b"{")
    take(bench, message({**GOOD, "severity": "extreme"}))
    assert not bench.store.published
    assert bench.store.counted == {"escalation.answer_invalid": 1, "escalation.answer_outside_schema": 1}
    take(bench, message(GOOD))
    assert bench.outcomes() == [("escalated", "answered", None)]


def test_of_two_answers_the_first_counts(asked_over_mqtt: Bench) -> None:
    bench = asked_over_mqtt
    take(bench, message(GOOD))
    take(bench, message({**GOOD, "severity": "high"}))
    assert [decision.decision for decision in bench.store.published] == [GOOD]
    assert bench.store.counted == {"escalation.answer_late": 1}


def test_an_answer_to_no_question_or_to_one_that_went_to_a_server_is_dropped() -> None:
    bench = Bench(MemoryStore(case_of()), None)
    take(bench, message(GOOD))
    take(bench, message(GOOD), decision_id="0" * 32)
    take(bench, message(GOOD), task="other")
    assert not bench.store.published
    assert bench.store.counted == {"escalation.answer_late": 3}


def test_guards_override_a_person_as_well() -> None:
    bench = Bench(MemoryStore(case_of(task=task_of(to="mqtt"), event={**EVENT, "code": "FIRE"})), None)
    take(bench, message(GOOD))
    [decision] = bench.store.published
    assert (decision.decision["severity"], decision.guards) == ("high", ("fire_is_high",))
