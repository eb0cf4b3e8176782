"""The worker among other processes: its trial, its parent, its priority, its idle threads, and no connection."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings
from tests.fakes.bundles import BundleVariant
from tests.fakes.faults import fault_of
from tests.fakes.mqtt_peer import wait_until
from tests.fakes.workers import CALM, EVENT, FAKE, fake_worker, gone

ROOT = Path(__file__).parents[2]


def test_golden_examples_run_in_the_worker_and_count_their_progress(real_worker: WorkerProcess) -> None:
    real_worker.start()
    steps: list[tuple[int, int]] = []
    outcome = real_worker.run_golden(lambda done, total: steps.append((done, total)))
    assert outcome.total > 0
    assert outcome.wrong == ()
    assert outcome.p95_ms > 0
    assert outcome.peak_rss_bytes > 20 << 20
    assert steps == [(n, outcome.total) for n in range(1, outcome.total + 1)]


def test_documents_without_a_fault_bring_no_judge_into_the_worker(real_worker: WorkerProcess) -> None:
    real_worker.start()
    real_worker.decide("triage", EVENT, 60.0)
    real_worker.run_golden()
    assert "pydantic" not in Path(f"/proc/{real_worker.pid}/maps").read_text()


def test_wrong_golden_answers_are_listed(variant: Callable[[], BundleVariant], worker_settings: WorkerSettings) -> None:
    bundle = variant()
    task_file = bundle.path / "tasks/triage/golden.jsonl"
    lines = [json.loads(line) for line in task_file.read_text().splitlines() if line.strip()]
    lines[1]["decision"]["escalate"] = not lines[1]["decision"]["escalate"]
    bundle.put("tasks/triage/golden.jsonl", "\n".join(map(json.dumps, lines)))
    bundle.seal()
    worker = WorkerProcess(bundle.path, bundle.digest, worker_settings)
    try:
        worker.start()
        (miss,) = worker.run_golden().wrong
    finally:
        worker.stop()
    assert (miss.task, miss.index, miss.error) == ("triage", 1, None)
    assert miss.got is not None
    assert miss.got["escalate"] is not miss.expected["escalate"]


def test_golden_run_without_progress_is_stuck() -> None:
    with fake_worker() as worker:
        worker.start()
        assert fault_of(worker.run_golden).code == "worker.stuck"
        assert not worker.alive


def test_worker_dies_with_the_agent() -> None:
    script = (
        "import pathlib, signal\n"
        "from edge_agent.runtime.worker_process import WorkerProcess\n"
        "from edge_agent.settings import WorkerSettings\n"
        f"worker = WorkerProcess(pathlib.Path('any'), '0' * 64, WorkerSettings(threads=1), module={FAKE!r})\n"
        "worker.start()\n"
        "print(worker.pid, flush=True)\n"
        "worker.decide('task', {'act': 'hang'}, 600.0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        worker_pid = int(agent.stdout.readline())
        agent.kill()
    wait_until(lambda: gone(worker_pid), timeout_s=20.0)


def test_worker_outlives_the_thread_that_started_it() -> None:
    with fake_worker() as worker:
        thread = threading.Thread(target=worker.start)
        thread.start()
        thread.join(30)
        # The parent-death signal follows the thread that forked: were it this one, the worker would be dead now.
        assert worker.decide("task", CALM, 5.0).passes == 1


def test_worker_is_the_kernels_first_choice_when_memory_is_short() -> None:
    with fake_worker() as worker:
        worker.start()
        own = int(Path("/proc/self/oom_score_adj").read_text())
        assert int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text()) == min(1000, own + 300)


def test_a_worker_that_shall_stand_back_for_the_plants_software_does() -> None:
    with fake_worker(niceness=7) as worker:
        worker.start()
        assert worker.pid is not None
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(19, own + 7)


def test_ctrl_c_and_service_stop_do_not_cut_an_answer_short() -> None:
    with fake_worker() as worker:
        worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.decide("task", CALM, 5.0).passes == 1


def test_the_threads_stop_spinning_with_the_answer_and_then_none_runs_at_all(
    reference_bundle: Path, reference_digest: str
) -> None:
    worker = WorkerProcess(reference_bundle, reference_digest, WorkerSettings(threads=2))
    try:
        worker.start()
        worker.decide("triage", EVENT, 600.0)
        answered = _runs(worker.pid)
        # On a busy machine it may take a while until the last thread gets to sleep.
        wait_until(lambda: _is_quiet(worker.pid), timeout_s=20.0)  # else something wakes up to look around
        idle = _runs(worker.pid)
        assert len(idle) >= 2, "the pool's thread is among them"
        # Left to itself the pool spins on for some 20 ms of processor time.
        assert sum(cpu_ms - answered.get(thread, (0.0, 0))[0] for thread, (cpu_ms, _) in idle.items()) < 4.0
    finally:
        worker.stop()


def _is_quiet(pid: int | None) -> bool:
    before = _runs(pid)
    time.sleep(0.3)  # the time over which idleness is measured, not a wait for something
    return _runs(pid) == before


def _runs(pid: int | None) -> dict[str, tuple[float, int]]:
    """By thread: its processor time in ms, and how often the scheduler has let it run."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns, _, runs = (task / "schedstat").read_text().split()
        found[task.name] = (int(cpu_ns) / 1e6, int(runs))
    return found


def test_the_agents_side_loads_no_native_inference_library() -> None:
    script = (
        "import sys\n"
        "import edge_agent.runtime.worker_process\n"
        "import edge_agent.runtime.serving\n"
        "print([m for m in ('numpy', 'onnxruntime', 'llguidance', 'tokenizers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _bare_environment() -> dict[str, str]:
    """Neither our switch nor a build server's CI variables, which also silence the library."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")}
    return {**kept, "OPENBLAS_NUM_THREADS": "1"}  # so that numpy adds no threads of its own


def test_importing_the_session_starts_no_telemetry_thread() -> None:
    def threads_after(statement: str, environment: dict[str, str]) -> int:
        script = f"{statement}\nimport os\nprint(len(os.listdir('/proc/self/task')))"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    environment = _bare_environment()
    # The control: this very version of the library does start one when nobody switches it off.
    assert threads_after("import onnxruntime", environment) > 1
    assert threads_after("import edge_agent.runtime.session", environment) == 1


@pytest.mark.slow
@pytest.mark.needs("strace")
def test_no_connection_is_attempted_while_loading_and_deciding(reference_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, time\n"
        "from edge_agent.contract.manifest import read_manifest\n"
        "from edge_agent.runtime.worker_process import WorkerProcess\n"
        "from edge_agent.settings import WorkerSettings\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "worker = WorkerProcess(path, read_manifest(path)[1], WorkerSettings(threads=2))\n"
        "worker.start()\n"
        f"print(worker.decide('triage', {EVENT!r}, 60.0).passes)\n"
        # The library's first report would leave nine seconds after its import (seen in 1.32).
        "time.sleep(12)\n"
        "worker.stop()\n"
    )
    strace = shutil.which("strace")
    assert strace is not None
    trace = tmp_path / "trace"
    done = subprocess.run(
        [strace, "-f", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace), sys.executable, "-c", script,
         str(reference_bundle)],
        cwd=ROOT, env=_bare_environment(), capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert int(done.stdout) > 0, done.stderr[-2000:]
    calls = [line for line in trace.read_text().splitlines() if "AF_INET" in line or "connect(" in line]
    assert calls == []
