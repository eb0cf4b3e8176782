"""The choice of a thread count, on machines that are functions: cores, heat, deaths and too little time."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.contract.event import Event
from edge_agent.errors import TransientError
from edge_agent.runtime.answer import Answer, WorkerFacts
from edge_agent.runtime.thread_choice import SWEEP_NICENESS, ThreadChoice
from edge_agent.runtime.thread_sweep import Job, choose_threads, counts_for, sweep, usable_cores
from edge_agent.settings import WorkerSettings
from tests.fakes.bundles import bundle_of_task

JOBS = [Job("triage", {"text": "hot"}, 1.0), Job("triage", {"text": "cold"}, 1.0)]
ANSWER = Answer({}, {}, "device", (), (), truncated=False, passes=1, tokens_out=1, latency_ms=0.0)
FACTS = WorkerFacts(0.1, 1, ("CPUExecutionProvider",), ("triage",), {"triage": 3}, 1)
LOAD_S = 2.0
ROOMY_S = 1000.0


class Machine:
    """A clock that decisions and loads push on, and workers whose speed is a function of threads and time."""

    def __init__(self, latency_ms: Callable[[int, float], float]) -> None:
        self.now_s = 0.0
        self.latency_ms = latency_ms
        self.loaded = 0
        self.most_loaded = 0
        self.loads: list[int] = []
        self.dies_with: int | None = None

    def clock(self) -> float:
        return self.now_s

    def worker_with(self, threads: int, left_s: float) -> MachineWorker:
        return MachineWorker(self, threads)


class MachineWorker:
    def __init__(self, machine: Machine, threads: int) -> None:
        self._machine = machine
        self._threads = threads
        self._is_loaded = False

    def start(self) -> WorkerFacts:
        self._machine.now_s += LOAD_S
        self._machine.loads.append(self._threads)
        self._is_loaded = True
        self._machine.loaded += 1
        self._machine.most_loaded = max(self._machine.most_loaded, self._machine.loaded)
        return FACTS

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        if self._threads == self._machine.dies_with:
            raise TransientError("worker.died", "no such instruction")
        latency_ms = self._machine.latency_ms(self._threads, self._machine.now_s)
        self._machine.now_s += latency_ms / 1000
        return dataclasses.replace(ANSWER, latency_ms=latency_ms)

    def stop(self) -> None:
        self._machine.loaded -= self._is_loaded
        self._is_loaded = False


def speeds(*latencies_ms: float) -> Callable[[int, float], float]:
    return lambda threads, _now_s: latencies_ms[threads - 1]


def chosen(machine: Machine, cores: int = 4, budget_s: float = ROOMY_S) -> int | None:
    return choose_threads(sweep(machine.worker_with, JOBS, counts_for(cores), budget_s, machine.clock))


@pytest.mark.parametrize(
    ("latencies_ms", "expected"),
    [
        ((100, 60, 59, 58.5), 2),  # the third and fourth core buy nearly nothing
        ((100, 60, 50, 40), 4),
        ((100, 60, 70, 90), 2),  # a Raspberry Pi 5: two beat four
        ((40, 60, 70, 90), 1),
        ((10.4, 10.4, 10.4, 10), 1),
        ((10.6, 10.6, 10.6, 10), 4),
    ],
)
def test_the_smallest_count_within_five_per_cent_of_the_best_is_taken(
    latencies_ms: tuple[float, ...], expected: int
) -> None:
    assert chosen(Machine(speeds(*latencies_ms))) == expected


def test_a_machine_that_slows_down_meanwhile_slows_down_every_count_alike() -> None:
    def heating(threads: int, now_s: float) -> float:
        return speeds(100, 80, 70, 60)(threads, now_s) * (1 + now_s / 20)

    assert chosen(Machine(heating)) == 4


def test_a_count_that_was_never_measured_is_no_reason_to_take_another() -> None:
    machine = Machine(speeds(100, 60, 50, 40))
    assert chosen(machine, budget_s=2.5 * LOAD_S) is None
    assert machine.now_s < 5 * LOAD_S, "the limit is kept but for what was under way"
    assert machine.loads[0] == 1


def test_half_the_visits_are_enough_when_the_time_is_short() -> None:
    machine = Machine(speeds(100, 60, 50, 40))
    assert chosen(machine, budget_s=4 * (LOAD_S + 1.5)) == 4
    assert machine.loads[:4] == [1, 2, 3, 4]


def test_no_two_models_are_held_at_once_and_none_is_left_behind() -> None:
    machine = Machine(speeds(100, 60, 50, 40))
    chosen(machine)
    assert (machine.most_loaded, machine.loaded) == (1, 0)
    assert machine.loads == [1, 2, 3, 4, 3, 2, 1]
    machine.dies_with = 3
    with pytest.raises(TransientError):
        chosen(machine)
    assert machine.loaded == 0


def test_many_cores_are_not_tried_one_by_one() -> None:
    assert counts_for(1) == (1,)
    assert counts_for(3) == (1, 2, 3)
    assert counts_for(64) == (1, 2, 3, 4, 6, 8, 12, 16)


# ---- what is kept


GOLDEN = '{"event": {"text": "hot"}, "decision": {"severity": "high"}}\n'


class Device:
    """A state directory, a bundle with golden examples, and what workers were asked for."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "threads.json"
        self.bundle, self.digest = bundle_of_task(directory / "bundle", golden=GOLDEN)
        self.machine = Machine(speeds(*[60] * 16))
        self.asked: list[WorkerSettings] = []

    def choice(self, machine: str = "pi, 4 cores", runtime: str = "1.32.0", **settings: float) -> ThreadChoice:
        return ThreadChoice(
            WorkerSettings.model_validate(settings),
            self.path,
            machine=machine,
            runtime=runtime,
            worker=self._worker,
            clock=self.machine.clock,
        )

    def _worker(self, bundle: Path, digest: str, settings: WorkerSettings) -> MachineWorker:
        assert (bundle, digest) == (self.bundle, self.digest)
        self.asked.append(settings)
        return MachineWorker(self.machine, settings.threads)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_choice_outlives_the_process_and_goes_to_the_worker_of_that_bundle_alone(device: Device) -> None:
    device.choice().sweep(device.bundle, device.digest)
    later = device.choice()
    assert later.settings_for(device.digest).threads == 1
    assert later.settings_for("f" * 64).threads == 0
    assert {settings.niceness for settings in device.asked} == {SWEEP_NICENESS}
    assert sorted({settings.threads for settings in device.asked}) == list(counts_for(usable_cores()))


def test_a_count_that_an_operator_set_is_neither_measured_nor_overruled(device: Device) -> None:
    device.choice().sweep(device.bundle, device.digest)
    device.asked.clear()
    fixed = device.choice(threads=3)
    fixed.sweep(device.bundle, "0" * 64)
    assert fixed.settings_for(device.digest).threads == 3
    assert device.asked == []


def test_a_sweep_that_was_switched_off_is_not_made(device: Device) -> None:
    device.choice(thread_sweep_s=0).sweep(device.bundle, device.digest)
    assert (device.asked, device.path.exists()) == ([], False)


def test_a_bundle_that_was_measured_is_not_measured_again(device: Device) -> None:
    device.choice().sweep(device.bundle, device.digest)
    device.asked.clear()
    device.choice().sweep(device.bundle, device.digest)
    assert device.asked == []


@pytest.mark.parametrize(
    "other", [{"machine": "pi, 2 cores"}, {"runtime": "1.33.0"}], ids=["another machine", "another ONNX Runtime"]
)
def test_what_was_measured_elsewhere_does_not_count_here(device: Device, other: dict[str, str]) -> None:
    device.choice().sweep(device.bundle, device.digest)
    assert (
        device.choice(machine=other.get("machine", "pi, 4 cores"), runtime=other.get("runtime", "1.32.0")).find(
            device.digest
        )
        is None
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00" * 200,
        b"[]",
        b'{"format": 2, "choices": []}',
        b'{"format": 1, "choices": [{"digest": "x"}]}',
        b'{"format": 1, "choices": [{"digest": "%s", "machine": "pi, 4 cores", "runtime": "1.32.0", "threads": 0, '
        b'"p50_ms": {}, "measured_ms": 1}]}' % (b"0" * 64),
    ],
)
def test_a_damaged_file_means_the_default_and_the_next_sweep_replaces_it(device: Device, content: bytes) -> None:
    device.path.write_bytes(content)
    assert device.choice().settings_for("0" * 64).threads == 0
    device.choice().sweep(device.bundle, device.digest)
    assert device.choice().settings_for(device.digest).threads == 1


def test_a_worker_that_dies_in_the_sweep_leaves_the_default_and_no_file(device: Device) -> None:
    device.machine.dies_with = 1
    device.choice().sweep(device.bundle, device.digest)
    assert not device.path.exists()
    assert device.choice().settings_for(device.digest).threads == 0


def test_a_directory_that_takes_no_file_does_not_fail_the_installation(device: Device) -> None:
    device.path = device.path.parent / "missing" / "threads.json"
    device.choice().sweep(device.bundle, device.digest)
    assert device.asked, "it was measured"
    assert device.choice().settings_for(device.digest).threads == 0


def test_the_choices_of_both_slots_are_kept_and_their_number_is_bounded(device: Device) -> None:
    device.choice().sweep(device.bundle, device.digest)
    (first,) = json.loads(device.path.read_text())["choices"]
    others = [{**first, "digest": f"{n:064x}"} for n in range(20)]
    device.path.write_text(json.dumps({"format": 1, "choices": others}))
    device.choice().sweep(device.bundle, device.digest)
    kept = [choice["digest"] for choice in json.loads(device.path.read_text())["choices"]]
    assert kept == [device.digest, *(other["digest"] for other in others[:7])]


def test_a_stop_ends_a_sweep_under_way_and_nothing_is_kept_of_it(device: Device) -> None:
    choice = device.choice()
    entered = threading.Event()
    stopped = threading.Event()

    def until_stopped(_threads: int, _now_s: float) -> float:
        entered.set()
        assert stopped.wait(30)
        raise TransientError("worker.died", "the worker was stopped")

    device.machine.latency_ms = until_stopped
    thread = threading.Thread(target=choice.sweep, args=(device.bundle, device.digest))
    thread.start()
    assert entered.wait(30)
    choice.stop()
    assert device.machine.loaded == 0, "the worker that was measured has been ended"
    stopped.set()
    thread.join(30)
    assert not device.path.exists()
    choice.sweep(device.bundle, device.digest)
    assert len(device.machine.loads) == 1, "and none begins any more"
