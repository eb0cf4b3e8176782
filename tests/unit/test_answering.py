"""Whose fault it is when an event gets no answer: the event's, the model's, or nobody's. Real spool, fake workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edge_agent.answering import ASIDE_S, Answering, Step
from edge_agent.contract.event import Event
from edge_agent.contract.messages import Decision, now_ms
from edge_agent.contract.task import TaskSpec
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError, TransientError
from edge_agent.runtime.answer import Answer, WorkerFacts
from edge_agent.runtime.serving import ServingWorker
from edge_agent.settings import NodeSettings, SpoolSettings, WorkerSettings
from edge_agent.uplink.records import InboxEvent, OutboundMessage, Priority
from edge_agent.uplink.spool import Spool
from tests.fakes.bundles import bundle_of_task

ANSWER = Answer(
    decision={"severity": "low"},
    confidence={"severity": 0.9},
    route="device",
    unsure_fields=(),
    guards=(),
    truncated=False,
    passes=1,
    tokens_out=3,
    latency_ms=1.0,
)


class ScriptedWorker:
    """Answers, or fails as told; dies with every error of a lost worker."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.alive = False
        self.pid = None

    def start(self) -> WorkerFacts:
        if self._bench.start_fault is not None:
            raise self._bench.start_fault
        self.alive = True
        return WorkerFacts(
            0.1, 1, ("CPUExecutionProvider",), ("triage",), {"triage": 3}, 1, together=self._bench.together
        )

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        self._bench.asked += 1
        fault = self._bench.fault
        if fault is None and event.get("text") == "poison":
            fault = self._bench.poison_fault
        if fault is not None:
            self.alive = fault.code not in {"worker.died", "worker.stuck", "worker.protocol"}
            raise fault
        return ANSWER

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        self._bench.batches.append(len(events))
        if self._bench.late_together:
            return [PermanentError("worker.deadline", "too slow") for _ in events]
        found: list[Answer | EdgeError] = []
        for event in events:
            try:
                found.append(self.decide(task, event, deadline_s))
            except EdgeError as error:
                if not self.alive:
                    raise
                found.append(error)
        return found

    def stop(self) -> None:
        self.alive = False


class FillingSpool(Spool):
    """A spool whose disk takes no decision while ``is_full``."""

    is_full = False

    def complete(self, inbox_id: int, messages: Sequence[OutboundMessage]) -> bool:
        if self.is_full:
            raise TransientError("disk.full", "no room")
        return super().complete(inbox_id, messages)


class ShyEscalation:
    """Takes every event over, once it is told to."""

    def __init__(self) -> None:
        self.is_full: bool | None = None
        self.begun: list[str] = []

    def begin(self, row: InboxEvent, decision: Decision, task: TaskSpec) -> Decision | None:
        if self.is_full is None:
            return decision
        if self.is_full:
            raise TransientError("disk.full", "no room")
        self.begun.append(row.event_id)
        return None


class Bench:
    """An `Answering` over a real spool, with a model that fails as ``fault`` says."""

    def __init__(self, directory: Path) -> None:
        self.fault: EdgeError | None = None
        self.start_fault: EdgeError | None = None
        self.poison_fault: EdgeError | None = None
        self.asked = 0
        self.together = 4
        self.late_together = False
        self.batches: list[int] = []
        self.now_s = 0.0
        self.unproven = False
        self.escalation = ShyEscalation()
        self.spool = FillingSpool(directory / "spool.sqlite", SpoolSettings())
        self.serving = ServingWorker(
            WorkerSettings(restart_backoff_max_s=0.001), lambda _bundle, _digest: ScriptedWorker(self)
        )
        bundle, digest = bundle_of_task(directory / "bundle")
        self.serving.exchange(bundle, digest)
        self._answering = Answering(
            self.spool,
            self.serving,
            NodeSettings(),
            NodeTopics("s", "n"),
            lambda: self.unproven,
            clock=lambda: self.now_s,
            escalation=self.escalation,
        )
        self.take("e-1")

    def take(self, event_id: str, text: str = "hot", priority: Priority = "normal") -> None:
        self.spool.accept("triage", event_id, json.dumps({"text": text}).encode(), priority, now_ms())

    def step(self) -> Step:
        while self.serving.model is not None and not self.serving.ready:
            pass
        self.now_s += ASIDE_S
        return self._answering.step()

    def decided(self) -> list[str]:
        return [json.loads(queued.message.payload)["event_id"] for queued in self.spool.pending(10)]

    def waiting(self) -> int:
        return self.spool.counts().inbox


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    yield one
    one.spool.close()
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_an_answered_event_is_replaced_by_its_decision(bench: Bench) -> None:
    assert bench.step() is Step.ANSWERED
    assert bench.waiting() == 0
    decision = json.loads(bench.spool.pending(10)[0].message.payload)
    assert (decision["event_id"], decision["decision"]) == ("e-1", {"severity": "low"})


def test_an_event_over_which_the_proven_model_dies_twice_is_poison(bench: Bench) -> None:
    bench.fault = TransientError("worker.died", "killed")
    assert [bench.step(), bench.step()] == [Step.BLOCKED, Step.BURIED]
    assert bench.spool.dead_letters()[0].code == "event.poison"


@pytest.mark.parametrize(
    "fault",
    [
        TransientError("worker.died", "killed"),
        TransientError("worker.stuck", "killed"),
        PermanentError("worker.deadline", "too slow"),
        PermanentError("worker.bad_logits", "NaN"),
    ],
    ids=lambda fault: fault.code,
)
def test_an_event_is_not_given_up_for_the_faults_of_a_candidate_on_probation(bench: Bench, fault: EdgeError) -> None:
    bench.unproven, bench.fault = True, fault
    assert {bench.step() for _ in range(4)} == {Step.BLOCKED}
    assert bench.serving.counts().errors == 4, "the updater must see them"
    bench.unproven, bench.fault = False, None
    assert bench.step() is Step.ANSWERED


def test_a_candidate_that_cannot_answer_one_event_still_answers_the_others(bench: Bench) -> None:
    bench.unproven, bench.poison_fault = True, PermanentError("worker.bad_logits", "NaN")
    bench.take("e-0", "poison", "safety")
    assert [bench.step(), bench.step()] == [Step.BLOCKED, Step.BLOCKED], "its turn comes again after a pause"
    bench.now_s -= ASIDE_S
    assert bench.step() is Step.ANSWERED
    assert bench.decided() == ["e-1"]
    bench.unproven, bench.poison_fault = False, None
    bench.now_s -= ASIDE_S
    assert bench.step() is Step.ANSWERED, "the verdict ends the pause"


@pytest.mark.parametrize(
    "fault",
    [
        TransientError("worker.died", "killed while loading"),
        PermanentError("worker.out_of_memory", "no memory to load the bundle"),
        IntegrityError("bundle.file_corrupt", "a worn card"),
    ],
    ids=lambda fault: fault.code,
)
def test_a_worker_that_cannot_be_restarted_costs_no_event(bench: Bench, fault: EdgeError) -> None:
    bench.fault = TransientError("worker.stuck", "killed")
    assert bench.step() is Step.BLOCKED
    bench.fault, bench.start_fault = None, fault
    assert {bench.step() for _ in range(4)} == {Step.BLOCKED}
    assert (bench.waiting(), bench.spool.dead_letters()) == (1, [])
    bench.start_fault = None
    assert bench.step() is Step.ANSWERED


def test_a_worker_whose_every_answer_is_garbage_does_not_hold_up_the_inbox_for_ever(bench: Bench) -> None:
    bench.fault = TransientError("worker.protocol", "garbage")
    assert [bench.step(), bench.step()] == [Step.BLOCKED, Step.BURIED]


def test_a_decision_that_the_disk_did_not_take_is_written_later_and_not_made_again(bench: Bench) -> None:
    bench.spool.is_full = True
    assert {bench.step() for _ in range(3)} == {Step.BLOCKED}
    bench.serving.stop()
    bench.spool.is_full = False
    assert bench.step() is Step.ANSWERED, "no model is needed to write what was decided"
    assert (bench.asked, bench.waiting(), bench.decided()) == (1, 0, ["e-1"])


def test_an_unsure_answer_that_the_disk_did_not_take_is_escalated_later_and_not_made_again(bench: Bench) -> None:
    bench.escalation.is_full = True
    assert {bench.step() for _ in range(3)} == {Step.BLOCKED}
    bench.escalation.is_full = False
    assert bench.step() is Step.ANSWERED
    assert (bench.asked, bench.escalation.begun, bench.decided()) == (1, ["e-1"], [])


def test_an_event_that_is_itself_wrong_is_buried_also_on_probation(bench: Bench) -> None:
    bench.unproven, bench.fault = True, RefusedError("event.too_long", "too long")
    assert bench.step() is Step.BURIED
    assert bench.spool.dead_letters()[0].code == "event.too_long"
    assert bench.serving.counts().errors == 0, "a wrong event says nothing about the model"


def test_an_event_of_a_task_that_an_update_removed_is_buried_with_the_reason(bench: Bench) -> None:
    bench.spool.accept("removed", "e-2", b'{"text": "x"}', "safety", now_ms())
    assert bench.step() is Step.BURIED
    assert bench.spool.dead_letters()[0].code == "task.unknown"


def test_events_wait_while_there_is_no_model(bench: Bench) -> None:
    bench.serving.stop()
    assert not bench.serving.ready
    assert bench.waiting() == 1


def flood(bench: Bench, *texts: str) -> None:
    """Events behind the first one, which shows what one costs."""
    assert bench.step() is Step.ANSWERED
    for number, text in enumerate(texts):
        bench.take(f"f-{number}", text)


def test_events_that_wait_are_asked_together_and_written_one_by_one_in_their_order(bench: Bench) -> None:
    flood(bench, *["hot"] * 6)
    assert bench.step() is Step.ANSWERED
    assert (bench.batches, bench.waiting()) == ([4], 5)
    assert [bench.step() for _ in range(3)] == [Step.ANSWERED] * 3
    assert bench.batches == [4]
    while bench.waiting():
        assert bench.step() is Step.ANSWERED
    assert bench.decided() == ["e-1", *(f"f-{n}" for n in range(6))]


def test_an_event_of_another_lane_is_not_overtaken(bench: Bench) -> None:
    flood(bench, "hot", "hot")
    bench.take("bulk-1", "hot", "bulk")
    bench.take("safe-1", "hot", "safety")
    while bench.waiting():
        assert bench.step() is Step.ANSWERED
    assert bench.decided() == ["e-1", "safe-1", "f-0", "f-1", "bulk-1"]
    assert bench.batches == [2]


def test_one_event_s_fault_costs_the_others_of_its_batch_nothing(bench: Bench) -> None:
    bench.poison_fault = RefusedError("event.too_long", "too long")
    flood(bench, "hot", "poison", "hot")
    assert [bench.step() for _ in range(3)] == [Step.ANSWERED, Step.BURIED, Step.ANSWERED]
    assert bench.decided() == ["e-1", "f-0", "f-2"]


def test_only_the_event_over_which_the_worker_dies_again_alone_is_buried(bench: Bench) -> None:
    bench.poison_fault = TransientError("worker.died", "killed")
    flood(bench, "hot", "poison", "hot", "hot")
    assert bench.step() is Step.BLOCKED
    while bench.waiting():
        bench.step()
    assert bench.decided() == ["e-1", "f-0", "f-2", "f-3"]
    (letter,) = bench.spool.dead_letters()
    assert (letter.event_id, letter.code) == ("f-1", "event.poison")
    assert bench.batches == [4], "each is tried alone then"


def test_a_candidate_that_dies_over_several_events_costs_none_of_them_an_attempt(bench: Bench) -> None:
    bench.unproven, bench.poison_fault = True, TransientError("worker.died", "killed")
    flood(bench, "poison", "hot", "hot")
    for _ in range(12):
        bench.step()
    bench.unproven, bench.poison_fault = False, None
    while bench.waiting():
        bench.step()
    assert bench.decided()[0] == "e-1"
    assert sorted(bench.decided()[1:]) == ["f-0", "f-1", "f-2"]
    assert bench.spool.dead_letters() == []


def test_an_event_that_was_late_in_company_gets_its_own_time(bench: Bench) -> None:
    bench.late_together = True
    flood(bench, "hot", "hot", "hot")
    while bench.waiting():
        bench.step()
    assert bench.decided() == ["e-1", "f-0", "f-1", "f-2"]
    assert (bench.batches, bench.spool.dead_letters()) == ([3], [])


def test_an_event_that_is_no_json_is_buried_and_its_company_is_answered(bench: Bench) -> None:
    flood(bench, "hot")
    bench.spool.accept("triage", "torn", b'{"text": ', "normal", now_ms())
    assert {bench.step() for _ in range(2)} == {Step.ANSWERED, Step.BURIED}
    assert bench.waiting() == 0


def test_a_full_disk_in_the_middle_of_a_batch_makes_no_decision_again(bench: Bench) -> None:
    flood(bench, "hot", "hot", "hot")
    assert bench.step() is Step.ANSWERED
    asked, bench.spool.is_full = bench.asked, True
    assert {bench.step() for _ in range(3)} == {Step.BLOCKED}
    bench.serving.stop()
    bench.spool.is_full = False
    assert [bench.step(), bench.step()] == [Step.ANSWERED, Step.ANSWERED]
    assert (bench.asked, bench.waiting()) == (asked, 0)


def test_events_wait_without_blame_while_the_worker_cannot_start(bench: Bench) -> None:
    flood(bench, "hot", "hot")
    bench.serving.pause()
    bench.serving.resume()
    bench.start_fault = TransientError("worker.died", "killed while loading")
    assert {bench.step() for _ in range(3)} == {Step.BLOCKED}
    bench.start_fault = None
    while bench.waiting():
        bench.step()
    assert bench.decided() == ["e-1", "f-0", "f-1"]
    assert bench.spool.dead_letters() == []
