"""The exchange of models on a machine that cannot hold two. Fake workers, real bundles on disk."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError, PermanentError, TransientError
from edge_agent.runtime.answer import Answer, GoldenMiss, GoldenOutcome, WorkerFacts
from edge_agent.runtime.serving import ServingWorker
from edge_agent.runtime.thread_choice import ThreadChoice
from edge_agent.settings import WorkerSettings
from edge_agent.update.ports import Interrupted
from edge_agent.updating import ModelExchange
from tests.fakes.bundles import TASK_YAML, bundle_of_task

ROOMY, TIGHT = 1 << 40, 0
UNSWEPT = ThreadChoice(WorkerSettings(thread_sweep_s=0), Path("nowhere"))


class Machine:
    """Counts the workers that are loaded at once."""

    def __init__(self) -> None:
        self.loaded = 0
        self.most = 0
        self.fault: EdgeError | None = None

    def worker(self, _bundle: Path, _digest: str) -> LoadedWorker:
        return LoadedWorker(self)


class LoadedWorker:
    """A worker that only takes up room."""

    pid = None

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.alive = False

    def start(self) -> WorkerFacts:
        if self._machine.fault is not None:
            raise self._machine.fault
        self.alive = True
        self._machine.loaded += 1
        self._machine.most = max(self._machine.most, self._machine.loaded)
        return WorkerFacts(0.1, 1, ("CPUExecutionProvider",), ("triage",), {"triage": 3}, 1)

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        raise PermanentError("worker.inference", "not asked here")

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        raise PermanentError("worker.inference", "not asked here")

    def stop(self) -> None:
        self._machine.loaded -= self.alive
        self.alive = False


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def serving(machine: Machine, tmp_path: Path) -> ServingWorker:
    serving = ServingWorker(WorkerSettings(), machine.worker)
    serving.exchange(*bundle_of_task(tmp_path / "old"))
    return serving


def exchange_with(serving: ServingWorker, available: Callable[[], int]) -> ModelExchange:
    return ModelExchange(serving, UNSWEPT, lambda _reported: None, lambda: None, available)


def candidate(tmp_path: Path) -> tuple[Path, str]:
    return bundle_of_task(tmp_path / "new", TASK_YAML.replace("Triage", "Newer"))


def test_without_memory_for_two_models_the_swap_loads_one_after_the_other(
    machine: Machine, serving: ServingWorker, tmp_path: Path
) -> None:
    bundle, digest = candidate(tmp_path)
    exchange_with(serving, lambda: TIGHT).swap(bundle, digest)
    assert (machine.most, machine.loaded) == (1, 1)
    assert serving.ready
    assert serving.model is not None
    assert serving.model.ref.digest == digest


def test_with_memory_for_two_models_the_old_one_answers_until_the_new_one_is_loaded(
    machine: Machine, serving: ServingWorker, tmp_path: Path
) -> None:
    exchange_with(serving, lambda: ROOMY).swap(*candidate(tmp_path))
    assert (machine.most, machine.loaded) == (2, 1)


def test_the_old_model_comes_back_when_it_made_room_for_one_that_does_not_start(
    machine: Machine, serving: ServingWorker, tmp_path: Path
) -> None:
    old = serving.model
    machine.fault = PermanentError("worker.out_of_memory", "too big")
    with pytest.raises(PermanentError):
        exchange_with(serving, lambda: TIGHT).swap(*candidate(tmp_path))
    machine.fault = None
    assert serving.ready
    serving.keep_alive()
    assert (machine.loaded, serving.model) == (1, old)


class EndlessTrial(LoadedWorker):
    """A side worker whose golden examples take until it is stopped."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.is_running = threading.Event()
        self._stopped = threading.Event()

    def run_golden(self) -> GoldenOutcome:
        self.is_running.set()
        assert self._stopped.wait(30)
        raise TransientError("worker.died", "the worker was stopped")

    def stop(self) -> None:
        self._stopped.set()
        super().stop()


def test_a_stop_in_the_middle_of_a_trial_ends_it_and_is_not_held_against_the_candidate(
    machine: Machine, serving: ServingWorker, tmp_path: Path
) -> None:
    trial = EndlessTrial(machine)
    exchange = ModelExchange(
        serving, UNSWEPT, lambda _reported: None, lambda: None, lambda: ROOMY, lambda _bundle, _digest: trial
    )

    def stop_it() -> None:
        assert trial.is_running.wait(30)
        exchange.stop_trial()

    stopping = threading.Thread(target=stop_it)
    stopping.start()
    with pytest.raises(Interrupted):
        exchange.trial(*candidate(tmp_path))
    stopping.join()
    assert machine.loaded == 1, "only the serving worker is left"


def test_a_worker_that_dies_in_its_trial_is_held_against_the_candidate(
    machine: Machine, serving: ServingWorker, tmp_path: Path
) -> None:
    trial = EndlessTrial(machine)
    trial.stop()
    exchange = ModelExchange(
        serving, UNSWEPT, lambda _reported: None, lambda: None, lambda: ROOMY, lambda _bundle, _digest: trial
    )
    assert not exchange.trial(*candidate(tmp_path)).passed


class QuickTrial(LoadedWorker):
    """A side worker that answers its golden examples, and events faster the fewer threads it has."""

    def __init__(self, machine: Machine, wrong: int = 0) -> None:
        super().__init__(machine)
        self._wrong = tuple(GoldenMiss("triage", n, {}, None) for n in range(wrong))

    def run_golden(self) -> GoldenOutcome:
        return GoldenOutcome(3, self._wrong, 1.0, 1)

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        return Answer({}, {}, "device", (), (), truncated=False, passes=1, tokens_out=1, latency_ms=1.0)


@pytest.mark.parametrize(
    ("available", "wrong", "is_measured"),
    [(ROOMY, 0, True), (TIGHT, 0, False), (ROOMY, 1, False)],
    ids=["passed", "passed while events wait for the memory", "failed"],
)
def test_threads_are_measured_for_a_candidate_that_passed_while_the_old_model_answers(
    machine: Machine, serving: ServingWorker, tmp_path: Path, available: int, wrong: int, *, is_measured: bool
) -> None:
    ticks = itertools.count(0.0, 0.1)
    threads = ThreadChoice(
        WorkerSettings(), tmp_path / "threads.json", worker=lambda *_: QuickTrial(machine), clock=lambda: next(ticks)
    )
    exchange = ModelExchange(
        serving,
        threads,
        lambda _reported: None,
        lambda: None,
        lambda: available,
        lambda _bundle, _digest: QuickTrial(machine, wrong),
    )
    golden = '{"event": {"text": "hot"}, "decision": {"severity": "high"}}\n'
    bundle, digest = bundle_of_task(tmp_path / "new", TASK_YAML.replace("Triage", "Newer"), golden=golden)
    assert exchange.trial(bundle, digest).passed is not bool(wrong)
    assert (threads.settings_for(digest).threads > 0) is is_measured
    assert machine.loaded == (1 if available == ROOMY else 0), "side workers are gone"


def test_a_stop_while_threads_are_measured_says_nothing_about_the_candidate(
    machine: Machine, serving: ServingWorker, tmp_path: Path
) -> None:
    class Stopped(QuickTrial):
        def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
            exchange.stop_trial()
            raise TransientError("worker.died", "the worker was stopped")

    threads = ThreadChoice(WorkerSettings(), tmp_path / "threads.json", worker=lambda *_: Stopped(machine))
    exchange = ModelExchange(
        serving,
        threads,
        lambda _reported: None,
        lambda: None,
        lambda: ROOMY,
        lambda _bundle, _digest: QuickTrial(machine),
    )
    golden = '{"event": {"text": "hot"}, "decision": {"severity": "high"}}\n'
    with pytest.raises(Interrupted):
        exchange.trial(*bundle_of_task(tmp_path / "new", TASK_YAML.replace("Triage", "Newer"), golden=golden))
    assert not (tmp_path / "threads.json").exists()
    assert machine.loaded == 1, "only the serving worker is left"
