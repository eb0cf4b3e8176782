"""Whose fault it is when an event gets no answer: the event's, the model's, or nobody's. Real spool, fake workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.answering import Answering, Step
from edge_agent.contract.event import Event
from edge_agent.contract.messages import now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, PermanentError, RefusedError, TransientError
from edge_agent.runtime.answer import Answer, WorkerFacts
from edge_agent.runtime.serving import ServingWorker
from edge_agent.settings import NodeSettings, SpoolSettings, WorkerSettings
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

    def __init__(self, fault: Callable[[], EdgeError | None]) -> None:
        self._fault = fault
        self.alive = False
        self.pid = None

    def start(self) -> WorkerFacts:
        self.alive = True
        return WorkerFacts(0.1, 1, ("CPUExecutionProvider",), ("triage",), {"triage": 3}, 1)

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        fault = self._fault()
        if fault is not None:
            self.alive = fault.code not in {"worker.died", "worker.stuck"}
            raise fault
        return ANSWER

    def stop(self) -> None:
        self.alive = False


class Bench:
    """An `Answering` over a real spool, with a model that fails as ``fault`` says."""

    def __init__(self, directory: Path) -> None:
        self.fault: EdgeError | None = None
        self.unproven = False
        self.spool = Spool(directory / "spool.sqlite", SpoolSettings())
        self.serving = ServingWorker(
            WorkerSettings(restart_backoff_max_s=0.001), lambda _bundle, _digest: ScriptedWorker(lambda: self.fault)
        )
        bundle, digest = bundle_of_task(directory / "bundle")
        self.serving.exchange(bundle, digest)
        self._answering = Answering(
            self.spool, self.serving, NodeSettings(), NodeTopics("s", "n"), lambda: self.unproven
        )
        self.spool.accept("triage", "e-1", json.dumps({"text": "hot"}).encode(), "normal", now_ms())

    def step(self) -> Step:
        while not self.serving.ready:
            pass
        return self._answering.step()

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
