"""Any interleaving of accept, complete, bury and crash: no acknowledged event is lost, none is answered twice."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_agent.errors import PermanentError, TransientError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import LANES, Accepted, InboxEvent, OutboundMessage, Priority
from edge_agent.uplink.spool import Spool

INBOX_MAX = 6
IDS = st.sampled_from([f"e{number}" for number in range(12)])


def power_cut() -> None:
    raise ConnectionError("power")


class SpoolMachine(RuleBasedStateMachine):
    """A sender that repeats itself, a worker that may stop anywhere, a process that may be cut off at any commit."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "spool.sqlite"
        self.acknowledged: set[str] = set()
        self.answers: Counter[str] = Counter()
        self.in_work: list[InboxEvent] = []
        self.spool = self.open()

    def open(self) -> Spool:
        defaults = SpoolSettings().model_dump()
        return Spool(self.path, SpoolSettings.model_construct(**{**defaults, "inbox_max_events": INBOX_MAX}))

    def answer_of(self, event: InboxEvent) -> OutboundMessage:
        return OutboundMessage("out", event.event_id.encode())

    @rule(event_id=IDS, lane=st.sampled_from(LANES))
    def event_arrives(self, event_id: str, lane: Priority) -> None:
        try:
            outcome = self.spool.accept("task", event_id, b"{}", lane, 1)
        except TransientError:
            assert self.spool.counts().inbox == INBOX_MAX
            return
        if outcome is Accepted:
            # Only an event that was displaced, never one that was answered, may be taken again.
            assert self.answers[event_id] == 0
        self.acknowledged.add(event_id)

    @rule(ids=st.lists(IDS, min_size=1, max_size=4), is_cut=st.booleans())
    def batch_arrives(self, *, ids: list[str], is_cut: bool) -> None:
        try:
            with self.spool.batch():
                for event_id in ids:
                    self.spool.accept("task", event_id, b"{}", "normal", 1)
                if is_cut:
                    power_cut()
        except (TransientError, ConnectionError):
            return
        self.acknowledged |= set(ids)

    @rule()
    def worker_takes(self) -> None:
        event = self.spool.next_event()
        if event is not None:
            assert event.inbox_id not in {e.inbox_id for e in self.in_work}
            self.in_work.append(event)

    @rule(data=st.data())
    def worker_answers(self, data: st.DataObject) -> None:
        if self.in_work:
            event = self.in_work.pop(data.draw(st.integers(0, len(self.in_work) - 1)))
            if self.spool.complete(event.inbox_id, [self.answer_of(event)]):
                self.answers[event.event_id] += 1

    @rule(data=st.data())
    def answer_is_cut_before_its_commit(self, data: st.DataObject) -> None:
        if self.in_work:
            event = self.in_work.pop(data.draw(st.integers(0, len(self.in_work) - 1)))
            with contextlib.suppress(ConnectionError), self.spool.batch():
                self.spool.complete(event.inbox_id, [self.answer_of(event)])
                power_cut()

    @rule(data=st.data())
    def worker_gives_up(self, data: st.DataObject) -> None:
        if self.in_work:
            event = self.in_work.pop(data.draw(st.integers(0, len(self.in_work) - 1)))
            self.spool.bury(event.inbox_id, PermanentError("worker.deadline", "slow"))

    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        if self.in_work:
            event = self.in_work.pop(data.draw(st.integers(0, len(self.in_work) - 1)))
            self.spool.worker_died(event.inbox_id, TransientError("worker.died", "killed"))

    @rule()
    def process_dies_and_comes_back(self) -> None:
        self.spool.close()
        self.in_work.clear()
        self.spool = self.open()

    @invariant()
    def every_acknowledged_event_is_somewhere(self) -> None:
        with self.spool._store.reading() as db:  # noqa: SLF001 - looks without taking a lease
            waiting = {row[0] for row in db.execute("SELECT event_id FROM inbox")}
        buried = {letter.event_id for letter in self.spool.dead_letters(10_000)}
        answered = {event_id for event_id, count in self.answers.items() if count}
        assert self.acknowledged <= waiting | buried | answered

    @invariant()
    def nothing_is_answered_twice(self) -> None:
        sent = Counter(m.message.payload.decode() for m in self.spool.pending(10_000))
        assert sent == Counter({k: v for k, v in self.answers.items() if v})
        assert all(count == 1 for count in sent.values())

    @invariant()
    def the_bounds_hold(self) -> None:
        counts = self.spool.counts()
        with self.spool._store.reading() as db:  # noqa: SLF001
            assert counts.inbox == db.execute("SELECT count(*) FROM inbox").fetchone()[0] <= INBOX_MAX
            assert counts.outbox == db.execute("SELECT count(*) FROM outbox").fetchone()[0]
            assert counts.dead_letters == db.execute("SELECT count(*) FROM dead_letters").fetchone()[0]

    def teardown(self) -> None:
        self.spool.close()
        self.directory.cleanup()


SpoolMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSpoolKeepsItsPromises = SpoolMachine.TestCase
