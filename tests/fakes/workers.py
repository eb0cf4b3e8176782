"""A worker whose faults are asked for, and what a test sees of a worker's process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from edge_agent.contract.event import Event
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings

EVENT: Event = {"machine": "press-4", "code": "E217", "text": "hydraulic pressure below setpoint for 12 s"}
FAKE = "tests.fakes.misbehaving_worker"
SMALL_MEMORY = 96 << 20
CALM: Event = {"act": "nothing"}


class Log:
    """Collects the worker's lines and lets a test wait for one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._news:
            self.lines.append(line)
            self._news.notify_all()

    def wait_for(self, line: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: line in self.lines, timeout=30), self.lines[-5:]


@contextlib.contextmanager
def fake_worker(log: Log | None = None, bundle: str = "any", **settings: float) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(
        Path(bundle),
        "0" * 64,
        WorkerSettings(threads=1, **settings),
        on_log=log,
        grace_s=0.2,
        module=FAKE,
    )
    try:
        yield worker
    finally:
        worker.stop()


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that its new parent has not reaped yet counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
