"""Events that cost a worker, through the real spool, the real loop body and real processes: twice, and never again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.answering import Answering, Step
from edge_agent.contract.messages import now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.runtime.serving import ServingWorker
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import NodeSettings, SpoolSettings, WorkerSettings
from edge_agent.uplink.spool import Spool
from tests.fakes.bundles import TASK_YAML, bundle_of_task

FAKE = "tests.fakes.misbehaving_worker"
LIMIT_S = 60.0
SMALL_MEMORY = 96 << 20
# Short, for the worker that hangs until then.
IMPATIENT_TASK = f"{TASK_YAML}deadline_ms: 300\n"


class Node:
    """Inbox, worker and outbox of one node, whose model does what an event says."""

    def __init__(self, directory: Path, settings: WorkerSettings) -> None:
        self.lines: list[str] = []
        self.started = 0
        self.spool = Spool(directory / "spool.sqlite", SpoolSettings())
        self._settings = settings
        self.serving = ServingWorker(settings, self._worker)
        self.serving.exchange(*bundle_of_task(directory / "bundle", IMPATIENT_TASK))
        topics = NodeTopics("s", "n")
        self._answering = Answering(self.spool, self.serving, NodeSettings(), topics, on_probation=lambda: False)

    def _worker(self, bundle: Path, digest: str) -> WorkerProcess:
        self.started += 1
        return WorkerProcess(bundle, digest, self._settings, on_log=self.lines.append, grace_s=0.2, module=FAKE)

    def take(self, event_id: str, act: str) -> None:
        self.spool.accept("triage", event_id, json.dumps({"act": act}).encode(), "normal", now_ms())

    def work(self) -> list[Step]:
        """Turn the loop until the inbox is empty; what the turns did, but for those that waited for a worker."""
        steps: list[Step] = []
        end_s = time.monotonic() + LIMIT_S
        while self.spool.counts().inbox:
            assert time.monotonic() < end_s, f"an event goes round for ever: {steps[-9:]}"
            if self.serving.ready:
                steps.append(self._answering.step())
        return steps

    def answered(self) -> list[str]:
        messages = [json.loads(queued.message.payload) for queued in self.spool.pending(100)]
        return [message["event_id"] for message in messages if "decision" in message]


def make_node(directory: Path, **settings: int) -> Node:
    return Node(directory, WorkerSettings(threads=1, restart_backoff_max_s=0.01, **settings))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    one = make_node(tmp_path, memory_limit_bytes=SMALL_MEMORY)
    yield one
    one.serving.stop()
    one.spool.close()


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("hang", "worker.stuck"),
        ("hoard", "worker.out_of_memory"),
        ("abort", "worker.died"),
        ("exit", "worker.died"),
        ("garbage", "worker.protocol"),
        ("no_number", "worker.bad_logits"),
        ("refused_pass", "worker.inference"),
    ],
)
def test_an_event_that_costs_a_worker_is_tried_twice_then_buried_and_the_next_one_is_answered(
    node: Node, act: str, code: str
) -> None:
    node.take("e-poison", act)
    node.take("e-next", "nothing")
    assert node.work() == [Step.BLOCKED, Step.BURIED, Step.ANSWERED]
    assert node.lines.count(f"asked to {act}") == 2
    (letter,) = node.spool.dead_letters()
    assert (letter.event_id, letter.code) == ("e-poison", "event.poison")
    assert code in letter.detail
    assert node.answered() == ["e-next"]
    assert (node.serving.deaths_total, node.started) == (2, 3)


def test_a_worker_that_leaks_is_replaced_between_two_events_and_no_event_is_lost(tmp_path: Path) -> None:
    node = make_node(tmp_path, rss_limit_bytes=64 << 20)
    try:
        for number in range(12):
            node.take(f"e-{number}", "leak")
        assert set(node.work()) == {Step.ANSWERED}, "a leak is no fault of the event at hand"
        assert node.answered() == [f"e-{number}" for number in range(12)]
        assert node.serving.outgrown_total >= 2
        assert node.serving.deaths_total == node.serving.outgrown_total
        assert node.serving.counts().worker_deaths == node.serving.outgrown_total, "probation must see them"
    finally:
        node.serving.stop()
        node.spool.close()


def test_a_worker_that_keeps_its_size_is_not_replaced(node: Node) -> None:
    for number in range(30):
        node.take(f"e-{number}", "nothing")
    node.work()
    assert (node.started, node.serving.outgrown_total) == (1, 0)
