"""The worker's faults, each with the agent's side alive and able to start it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError, TransientError
from edge_agent.runtime.frames import MAX_FRAME_BYTES
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings
from tests.fakes.faults import fault_of
from tests.fakes.workers import CALM, EVENT, FAKE, SMALL_MEMORY, Log, fake_worker, gone

ROOT = Path(__file__).parents[2]


def test_decides_and_says_what_it_loaded(real_worker: WorkerProcess) -> None:
    facts = real_worker.start()
    assert facts.tasks == ("triage",)
    assert facts.providers == ("CPUExecutionProvider",)
    assert facts.prefix_tokens["triage"] > 0
    assert 0 < facts.load_s < 60
    answer = real_worker.decide("triage", EVENT, 10.0)
    assert set(answer.decision) == set(answer.confidence)
    assert real_worker.alive
    assert (real_worker.rss_bytes() or 0) > 20 << 20


def test_worker_killed_in_the_middle_of_a_decision_is_reported_and_the_next_start_works() -> None:
    log = Log()
    with fake_worker(log) as worker:
        worker.start()
        faults: list[EdgeError] = []
        thread = threading.Thread(
            target=lambda: faults.append(fault_of(lambda: worker.decide("task", {"act": "hang"}, 60.0)))
        )
        thread.start()
        log.wait_for("hanging")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        thread.join(30)
        assert [f.code for f in faults] == ["worker.died"]
        assert faults[0].context == {"signal": "SIGKILL"}
        assert isinstance(faults[0], TransientError)
        assert not worker.alive
        worker.start()
        assert worker.decide("task", CALM, 5.0).decision == {"task": "task"}


def test_real_worker_killed_between_events_is_reported_and_the_next_start_works(real_worker: WorkerProcess) -> None:
    real_worker.start()
    before = real_worker.decide("triage", EVENT, 10.0)
    assert real_worker.pid is not None
    os.kill(real_worker.pid, signal.SIGKILL)
    assert fault_of(lambda: real_worker.decide("triage", EVENT, 10.0)).code == "worker.died"
    assert fault_of(lambda: real_worker.decide("triage", EVENT, 10.0)).code == "worker.not_running"
    real_worker.start()
    assert real_worker.decide("triage", EVENT, 10.0).decision == before.decision


def test_stopped_worker_is_stuck_within_deadline_and_grace(real_worker: WorkerProcess) -> None:
    real_worker.start()
    pid = real_worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    started_s = time.monotonic()
    fault = fault_of(lambda: real_worker.decide("triage", EVENT, 0.5))
    assert fault.code == "worker.stuck"
    assert isinstance(fault, TransientError)
    assert 0.8 <= time.monotonic() - started_s < 5.0
    assert not real_worker.alive
    assert gone(pid)


def test_event_larger_than_the_socket_buffer_does_not_block_on_a_stopped_worker() -> None:
    with fake_worker() as worker:
        worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        assert fault_of(lambda: worker.decide("task", {"text": "x" * 4_000_000}, 0.2)).code == "worker.stuck"


def test_missed_deadline_costs_the_event_but_not_the_worker(real_worker: WorkerProcess) -> None:
    real_worker.start()
    pid = real_worker.pid
    fault = fault_of(lambda: real_worker.decide("triage", EVENT, 0.0))
    assert fault.code == "worker.deadline"
    assert isinstance(fault, PermanentError)
    assert real_worker.pid == pid
    assert real_worker.decide("triage", EVENT, 10.0).passes > 0


@pytest.mark.parametrize(
    ("act", "context"), [("abort", {"signal": "SIGABRT"}), ("exit", {"exit_code": 9})], ids=["abort", "exit"]
)
def test_crash_is_named_by_signal_or_status(act: str, context: dict[str, object]) -> None:
    with fake_worker() as worker:
        worker.start()
        fault = fault_of(lambda: worker.decide("task", {"act": act}, 5.0))
        assert (fault.code, fault.context) == ("worker.died", context)


def test_memory_growth_past_the_limit_is_named_and_ends_the_worker() -> None:
    with fake_worker(memory_limit_bytes=SMALL_MEMORY) as worker:
        worker.start()
        fault = fault_of(lambda: worker.decide("task", {"act": "hoard"}, 30.0))
        assert fault.code == "worker.out_of_memory"
        assert isinstance(fault, TransientError)
        assert not worker.alive
        worker.start()
        assert worker.decide("task", CALM, 5.0).passes == 1


def test_onnxruntime_out_of_memory_is_named(reference_bundle: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from edge_agent.contract.manifest import read_manifest\n"
        "from edge_agent.errors import EdgeError\n"
        "from edge_agent.runtime.memory import limit_growth\n"
        "from edge_agent.runtime.session import ModelSession\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "session = ModelSession(path, read_manifest(path)[0], 1)\n"
        "cache = session.new_cache(20_000)\n"
        "cache.forward([5])\n"
        "limit_growth(0)\n"
        "for attempt in (lambda: cache.forward([5] * 10_000), lambda: session.new_cache(200_000)):\n"
        "    try:\n"
        "        attempt()\n"
        "    except EdgeError as error:\n"
        "        print(error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(reference_bundle)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["worker.out_of_memory"] * 2, done.stderr[-2000:]


def test_a_model_that_the_machine_cannot_hold_has_a_ceiling_while_it_loads(
    reference_bundle: Path, reference_digest: str
) -> None:
    script = (
        "import pathlib, resource, sys\n"
        "from edge_agent.runtime.memory import physical_bytes\n"
        "from edge_agent.runtime.speed import Speed\n"
        "from edge_agent.runtime.worker import EngineDecider\n"
        "before = resource.getrlimit(resource.RLIMIT_AS)[0]\n"
        "EngineDecider(pathlib.Path(sys.argv[1]), sys.argv[2], 1, Speed())\n"
        "ceiling = resource.getrlimit(resource.RLIMIT_AS)[0]\n"
        "print(before == resource.RLIM_INFINITY, physical_bytes() < ceiling < 2 * physical_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(reference_bundle), reference_digest],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


@pytest.mark.parametrize("act", ["garbage", "not_json", "stale"])
def test_garbage_or_the_answer_to_another_request_ends_the_worker(act: str) -> None:
    with fake_worker() as worker:
        worker.start()
        fault = fault_of(lambda: worker.decide("task", {"act": act}, 5.0))
        assert fault.code == "worker.protocol"
        assert not worker.alive


def test_worker_that_ends_in_the_middle_of_a_frame_is_not_waited_for() -> None:
    with fake_worker() as worker:
        worker.start()
        assert fault_of(lambda: worker.decide("task", {"act": "torn"}, 5.0)).code == "worker.protocol"
        assert not worker.alive


def test_a_defect_in_the_worker_costs_one_event_and_leaves_its_traceback_in_the_log() -> None:
    log = Log()
    with fake_worker(log) as worker:
        worker.start()
        fault = fault_of(lambda: worker.decide("task", {"act": "raise"}, 5.0))
        assert fault.code == "worker.internal"
        assert worker.decide("task", CALM, 5.0).passes == 1
        log.wait_for("ZeroDivisionError: a defect")


def test_refusal_crosses_the_process_boundary_whole() -> None:
    with fake_worker() as worker:
        worker.start()
        fault = fault_of(lambda: worker.decide("task", {"act": "refuse"}, 5.0))
        assert isinstance(fault, RefusedError)
        assert (fault.code, fault.detail, fault.context) == ("event.too_long", "as the test asked", {"tokens": 12})


def test_event_beyond_any_frame_is_refused_before_it_is_sent() -> None:
    with fake_worker() as worker:
        worker.start()
        fault = fault_of(lambda: worker.decide("task", {"text": "x" * MAX_FRAME_BYTES}, 5.0))
        assert fault.code == "event.too_large"
        assert worker.decide("task", CALM, 5.0).passes == 1


def test_every_line_of_a_shouting_worker_is_seen_in_bounded_pieces() -> None:
    log = Log()
    with fake_worker(log) as worker:
        worker.start()
        assert worker.decide("task", {"act": "shout"}, 20.0).passes == 1
        log.wait_for("the end")
    assert sum(line.count("x") for line in log.lines) == 300_000
    assert max(map(len, log.lines)) < 5000
    assert [line for line in log.lines if line.startswith("line ")] == [f"line {n}" for n in range(5000)]


def test_a_failing_log_does_not_stop_the_worker() -> None:
    def broken(line: str) -> None:
        raise OSError(line)

    worker = WorkerProcess(Path("any"), "0" * 64, WorkerSettings(threads=1), on_log=broken, module=FAKE)
    try:
        worker.start()
        assert worker.decide("task", {"act": "shout"}, 20.0).passes == 1
    finally:
        worker.stop()


def test_load_fault_keeps_its_kind_code_and_context() -> None:
    with fake_worker(bundle="refuses-to-load") as worker:
        fault = fault_of(worker.start)
        assert isinstance(fault, IntegrityError)
        assert (fault.code, fault.context) == ("bundle.file_corrupt", {"path": "model/decoder.onnx"})
        assert not worker.alive


def test_worker_that_dies_while_loading_leaves_its_last_words() -> None:
    with fake_worker(bundle="dies-at-load") as worker:
        fault = fault_of(worker.start)
        assert (fault.code, fault.context) == ("worker.died", {"exit_code": 7})
        assert "last words at load" in fault.detail


def test_the_brokers_password_does_not_reach_the_process_that_reads_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_AGENT_MQTT__PASSWORD", "hunter2")
    with fake_worker() as worker:
        worker.start()
        assert b"hunter2" not in Path(f"/proc/{worker.pid}/environ").read_bytes()


def test_worker_that_never_becomes_ready_is_killed() -> None:
    with fake_worker(bundle="hangs-at-load", start_timeout_s=2.0) as worker:
        assert fault_of(worker.start).code == "worker.start_timeout"
        assert not worker.alive


def test_asking_before_start_or_after_stop_is_an_error_not_a_hang() -> None:
    with fake_worker() as worker:
        assert fault_of(lambda: worker.decide("task", CALM, 1.0)).code == "worker.not_running"
        worker.start()
        worker.stop()
        assert fault_of(lambda: worker.decide("task", CALM, 1.0)).code == "worker.not_running"
        assert worker.pid is None
        assert worker.rss_bytes() is None


def test_stop_from_another_thread_wakes_a_waiting_call() -> None:
    log = Log()
    with fake_worker(log) as worker:
        worker.start()
        faults: list[EdgeError] = []
        thread = threading.Thread(
            target=lambda: faults.append(fault_of(lambda: worker.decide("task", {"act": "hang"}, 60.0)))
        )
        thread.start()
        log.wait_for("hanging")
        worker.stop()
        thread.join(30)
        assert [f.code for f in faults] == ["worker.died"]
