"""Which count of threads the sweep of an installation found, kept beside the slots in ``threads.json``.

Not in the slot: a bundle is signed, and what one machine measured is no part of it. A choice holds for one bundle on
one kind of machine with one version of ONNX Runtime; anything else, and a file that cannot be read, means the default.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_agent.contract.manifest import Sha256
from edge_agent.contract.messages import now_ms
from edge_agent.errors import EdgeError, TransientError
from edge_agent.fs import write_atomic
from edge_agent.log import get_logger
from edge_agent.runtime.machine_kind import machine_kind
from edge_agent.runtime.thread_sweep import (
    SweptWorker,
    choose_threads,
    counts_for,
    golden_jobs,
    sweep,
    usable_cores,
)
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings

FILE_NAME = "threads.json"
# Behind everything else that wants the processor; the serving worker is not to wait for a measurement.
SWEEP_NICENESS = 10
# The same few events are decided over and over: what is remembered of them says nothing about threads.
_NO_MEMORY = {"event_cache_bytes": 0, "decision_cache_bytes": 0, "prefix_dir": None}
_KEPT = 8
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
_log = get_logger(__name__)


class Choice(BaseModel):
    """One sweep's result.

    Args:
        digest: of the bundle.
        machine: see `this_machine`.
        runtime: version of ONNX Runtime.
        threads: the count that was taken.
        p50_ms: median of decisions by count.
        measured_ms: wall clock, ms since the epoch.
    """

    model_config = ConfigDict(frozen=True)

    digest: Sha256
    machine: str
    runtime: str
    threads: int = Field(ge=1, le=256)
    p50_ms: dict[int, float]
    measured_ms: int


class _File(BaseModel):
    format: Literal[1] = 1
    choices: tuple[Choice, ...] = ()


def this_machine() -> str:
    """What a choice holds for: the kind of machine, and how many of its cores are ours."""
    return f"{machine_kind()}, {usable_cores()} cores"


def runtime_version() -> str:
    """Version of the installed ONNX Runtime, read without loading it; empty where there is none."""
    for name in _RUNTIMES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


class ThreadChoice:
    """The thread counts of one device: measured at an installation, looked up at every start of a worker.

    Args:
        settings: the worker section; a ``threads`` other than 0 always wins, ``thread_sweep_s`` bounds a sweep.
        path: the file.
        machine: what a choice holds for.
        runtime: version of ONNX Runtime.
        worker: makes a worker on a bundle with given settings; the default makes a real process.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        path: Path,
        *,
        machine: str | None = None,
        runtime: str | None = None,
        worker: Callable[[Path, str, WorkerSettings], SweptWorker] = WorkerProcess,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._path = path
        self._machine = this_machine() if machine is None else machine
        self._runtime = runtime_version() if runtime is None else runtime
        self._worker = worker
        self._clock = clock
        self._stopping = threading.Event()
        self._running: SweptWorker | None = None

    def settings_for(self, digest: str) -> WorkerSettings:
        """The worker section for a bundle: with the count that was found for it, if any."""
        choice = None if self._settings.threads else self.find(digest)
        return self._settings if choice is None else self._settings.model_copy(update={"threads": choice.threads})

    def find(self, digest: str) -> Choice | None:
        """What was found for this bundle on this machine; None where nothing was."""
        wanted = (digest, self._machine, self._runtime)
        return next((c for c in self._read() if (c.digest, c.machine, c.runtime) == wanted), None)

    def sweep(self, bundle: Path, digest: str) -> None:
        """Measure a verified bundle and keep the result; nothing is done where a count is set or known.

        A sweep that fails or runs out of time says nothing about the bundle: it is logged, and the default stays.
        """
        if self._settings.threads or not self._settings.thread_sweep_s or self.find(digest) is not None:
            return

        def worker_with(count: int, left_s: float) -> SweptWorker:
            timeout_s = min(left_s, self._settings.start_timeout_s)
            update = {"threads": count, "start_timeout_s": timeout_s, "niceness": SWEEP_NICENESS, **_NO_MEMORY}
            self._running = self._worker(bundle, digest, self._settings.model_copy(update=update))
            if self._stopping.is_set():
                raise TransientError("worker.died", "the agent stops")
            return self._running

        try:
            counts = counts_for(usable_cores())
            jobs = golden_jobs(bundle)
            table = sweep(worker_with, jobs, counts, self._settings.thread_sweep_s, self._clock) if jobs else []
            threads = choose_threads(table) if table else None
            p50_ms = {measured.threads: round(measured.p50_ms, 3) for measured in table if measured.visits_ms}
            if threads is None:
                _log.warning("threads_not_measured", digest=digest[:12], p50_ms=p50_ms, why="no time or no examples")
                return
            self._keep(digest, threads, p50_ms)
        except EdgeError as error:
            _log.warning("threads_not_measured", digest=digest[:12], error=error)
            return
        finally:
            self._running = None
        _log.info("threads_measured", digest=digest[:12], threads=threads, p50_ms=p50_ms)

    def stop(self) -> None:
        """End a sweep under way, from any thread, and begin none any more."""
        self._stopping.set()
        running = self._running
        if running is not None:
            running.stop()

    def _keep(self, digest: str, threads: int, p50_ms: dict[int, float]) -> None:
        choice = Choice(
            digest=digest,
            machine=self._machine,
            runtime=self._runtime,
            threads=threads,
            p50_ms=p50_ms,
            measured_ms=now_ms(),
        )
        others = tuple(kept for kept in self._read() if kept.digest != digest)
        file = _File(choices=(choice, *others)[:_KEPT])
        write_atomic(self._path, file.model_dump_json(indent=1).encode() + b"\n")

    def _read(self) -> tuple[Choice, ...]:
        try:
            return _File.model_validate_json(self._path.read_bytes()).choices
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            _log.warning("threads_unreadable", path=str(self._path), error=str(error)[:200])
            return ()
