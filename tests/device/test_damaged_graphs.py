"""Graphs that go wrong inside ONNX Runtime, on some events: what is named, what survives, what is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from edge_agent.contract.event import Event
from edge_agent.errors import PermanentError, TransientError
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings
from tests.fakes import damaged_graphs
from tests.fakes.answers import timeless
from tests.fakes.bundles import BundleVariant
from tests.fakes.damaged_graphs import LONG_EVENT, Damage
from tests.fakes.faults import fault_of

SHORT: Event = {"machine": "press-4", "code": "E217", "text": "hydraulic pressure below setpoint for 12 s"}
OTHERS: tuple[Event, ...] = ({"machine": "m"}, {"text": "oven zone 3 overtemperature"})
Damaged = Callable[[Damage], BundleVariant]


@pytest.fixture
def damaged(variant: Callable[[], BundleVariant]) -> Damaged:
    """A bundle whose graph was damaged before it was signed."""

    def build(damage: Damage) -> BundleVariant:
        bundle = variant()
        damage(bundle.path / "model/decoder.onnx")
        bundle.seal()
        return bundle

    return build


@pytest.fixture
def worker_on() -> Iterator[Callable[..., WorkerProcess]]:
    started: list[WorkerProcess] = []

    def start(bundle: BundleVariant, grace_s: float) -> WorkerProcess:
        worker = WorkerProcess(
            bundle.path, bundle.digest, WorkerSettings(threads=1, decision_cache_bytes=0), grace_s=grace_s
        )
        started.append(worker)
        worker.start()
        return worker

    yield start
    for worker in started:
        worker.stop()


def test_a_pass_that_does_not_end_is_ended_at_the_deadline_and_the_next_event_is_answered(
    damaged: Damaged, worker_on: Callable[..., WorkerProcess]
) -> None:
    # A grace that no test waits for: what ends the pass is the worker itself.
    worker = worker_on(damaged(damaged_graphs.never_ends), grace_s=90.0)
    pid, before = worker.pid, timeless(worker.decide("triage", SHORT, 30.0))
    for _ in range(3):
        fault = fault_of(lambda: worker.decide("triage", LONG_EVENT, 0.3))
        assert isinstance(fault, PermanentError)
        assert (fault.code, worker.pid) == ("worker.deadline", pid)
        assert timeless(worker.decide("triage", SHORT, 30.0)) == before


def test_a_pass_cut_off_in_the_middle_leaves_nothing_behind_for_the_next_event(
    damaged: Damaged, engine: Engine
) -> None:
    cut = Engine(damaged(damaged_graphs.never_ends).open(), 1)
    assert fault_of(lambda: cut.decide("triage", LONG_EVENT, deadline_s=0.3)).code == "worker.deadline"
    for event in (SHORT, *OTHERS):
        found, expected = (timeless(each.decide("triage", event, deadline_s=30.0)) for each in (cut, engine))
        assert found == expected


def test_a_kernel_that_nothing_can_interrupt_is_killed_with_its_worker_after_the_grace(
    damaged: Damaged, worker_on: Callable[..., WorkerProcess]
) -> None:
    worker = worker_on(damaged(damaged_graphs.one_long_kernel), grace_s=0.3)
    fault = fault_of(lambda: worker.decide("triage", LONG_EVENT, 1.0))
    assert isinstance(fault, TransientError)
    assert (fault.code, worker.alive) == ("worker.stuck", False)
    worker.start()
    assert worker.decide("triage", SHORT, 30.0).passes > 0


@pytest.mark.parametrize(
    ("damage", "code"),
    [(damaged_graphs.no_number, "worker.bad_logits"), (damaged_graphs.refuses, "worker.inference")],
    ids=["no_number", "refuses"],
)
def test_a_process_in_which_arithmetic_failed_answers_no_further_event(
    damaged: Damaged, worker_on: Callable[..., WorkerProcess], damage: Damage, code: str
) -> None:
    worker = worker_on(damaged(damage), grace_s=1.0)
    before = timeless(worker.decide("triage", SHORT, 30.0))
    fault = fault_of(lambda: worker.decide("triage", LONG_EVENT, 30.0))
    assert isinstance(fault, TransientError), "a fresh process may try it once more"
    assert (fault.code, worker.alive) == (code, False)
    worker.start()
    assert timeless(worker.decide("triage", SHORT, 30.0)) == before


@pytest.mark.parametrize(
    "damage",
    [
        damaged_graphs.no_number,
        damaged_graphs.infinite,
        damaged_graphs.all_the_same,
        damaged_graphs.one_stray_score,
    ],
    ids=lambda damage: damage.__name__,
)
def test_garbage_scores_are_named_and_the_cache_that_they_left_spoils_no_later_event(
    damage: Damage, damaged: Damaged, engine: Engine
) -> None:
    broken = Engine(damaged(damage).open(), 1)
    for _ in range(2):
        assert fault_of(lambda: broken.decide("triage", LONG_EVENT, deadline_s=30.0)).code == "worker.bad_logits"
        # Shorter than what it is written over: the tail of the cache still holds what the long event left.
        for event in (SHORT, *OTHERS):
            found, expected = (timeless(each.decide("triage", event, deadline_s=30.0)) for each in (broken, engine))
            assert found == expected
