"""The agent's side of the worker: start it, ask it, survive it. Imports no native inference library.

Two clocks watch every event. The worker checks the deadline between passes and between the nodes of a pass, and
answers with an error. Should it be stuck inside one node, this side kills it a grace period later; the next `start`
begins afresh.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError, PermanentError, TransientError
from edge_agent.runtime.answer import Answer, GoldenMiss, GoldenOutcome, WorkerFacts
from edge_agent.runtime.child import ChildProcess, OnLine
from edge_agent.runtime.frames import LAST_FAULTS, FrameChannel, FrameTimeout, Message, error_from
from edge_agent.runtime.memory import rss_bytes
from edge_agent.settings import ENV_PREFIX, WorkerSettings

__all__ = ["Answer", "GoldenMiss", "GoldenOutcome", "WorkerFacts", "WorkerProcess"]

WORKER_MODULE = "edge_agent.runtime.worker"
GRACE_S = 1.0
STOP_TIMEOUT_S = 2.0
_REAP_TIMEOUT_S = 5.0
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent


class WorkerProcess:
    """One worker on one bundle. One call at a time; `stop`, `alive`, `pid` and `rss_bytes` may come from any thread.

    Args:
        bundle_dir: an installed bundle.
        digest: the digest that was verified when it was installed.
        settings: the worker section.
        on_log: gets every line that the worker writes to stdout or stderr.
        grace_s: seconds past the deadline after which a silent worker is killed.
        module: what to run; tests run workers that misbehave.
    """

    def __init__(
        self,
        bundle_dir: Path,
        digest: str,
        settings: WorkerSettings,
        *,
        on_log: OnLine | None = None,
        grace_s: float = GRACE_S,
        module: str = WORKER_MODULE,
    ) -> None:
        self._bundle_dir = bundle_dir
        self._digest = digest
        self._settings = settings
        self._on_log: OnLine = on_log or (lambda _line: None)
        self._grace_s = grace_s
        self._module = module
        self._child: ChildProcess | None = None
        self._channel: FrameChannel | None = None
        self._requests = 0

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        child = self._child
        return None if child is None else child.pid

    def rss_bytes(self) -> int | None:
        """Resident memory of the worker, None while there is none."""
        pid = self.pid
        return None if pid is None else rss_bytes(pid)

    def start(self) -> WorkerFacts:
        """Start the process and wait until it can decide (a running one is stopped first).

        Returns:
            What it loaded; ``load_s`` counts from the start of the process.

        Raises:
            IntegrityError: ``bundle.file_missing``, ``bundle.file_truncated``, ``bundle.file_corrupt``, …
            PermanentError: ``bundle.unsupported``, ``task.*``, ``worker.out_of_memory``.
            TransientError: ``worker.died``, ``worker.start_timeout``.
        """
        self.stop()
        started_s = time.monotonic()
        self._spawn()
        try:
            message = self._receive(self._settings.start_timeout_s)
        except FrameTimeout:
            self._kill()
            raise TransientError(
                "worker.start_timeout", f"worker was not ready within {self._settings.start_timeout_s:g} s"
            ) from None
        if "error" in message:
            self._end()
            raise error_from(message["error"])
        facts = WorkerFacts.from_dict(message["ready"])
        return replace(facts, load_s=time.monotonic() - started_s)

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        """Decide one event.

        Args:
            task: one of the bundle's tasks.
            event: a flat event.
            deadline_s: seconds from now.

        Returns:
            A schema-valid answer.

        Raises:
            RefusedError: ``task.unknown``, ``event.*``.
            PermanentError: ``worker.deadline``, ``worker.internal``, ….
            TransientError: ``worker.died``, ``worker.stuck``, ``worker.protocol``, ``worker.not_running``, and the
                `LAST_FAULTS`; the process is gone then and `start` begins a new one.
        """
        reply = self._ask({"op": "decide", "task": task, "event": event, "deadline_s": deadline_s}, deadline_s)
        return Answer.from_dict(reply["answer"])

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        """Decide events that wait, several in a pass where the model allows it.

        Args:
            task: one of the bundle's tasks.
            events: flat events.
            deadline_s: seconds from now, for all of them.

        Returns:
            For each event its answer, or the fault that it alone had.

        Raises:
            RefusedError: ``task.unknown``.
            TransientError: as `decide`; it is not known which event was to blame.
        """
        reply = self._ask(
            {"op": "decide_many", "task": task, "events": list(events), "deadline_s": deadline_s}, deadline_s
        )
        return [
            error_from(one["error"]) if "error" in one else Answer.from_dict(one["answer"]) for one in reply["answers"]
        ]

    def run_golden(self, progress: Callable[[int, int], None] | None = None) -> GoldenOutcome:
        """Answer the bundle's golden examples in the worker, each within its task's deadline.

        Args:
            progress: called with (done, total) after each example.

        Raises:
            TransientError: as `decide`; a worker that makes no progress is killed (``worker.stuck``).
        """
        reply = self._ask({"op": "golden"}, self._settings.start_timeout_s, progress)
        return GoldenOutcome.from_dict(reply["golden"])

    def stop(self) -> None:
        """End the process: politely at first, then not."""
        channel, child = self._channel, self._child
        if channel is not None:
            channel.close()
        if child is not None and not child.wait(STOP_TIMEOUT_S):
            child.kill()
            child.wait(_REAP_TIMEOUT_S)
        self._channel = self._child = None

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        settings = self._settings
        command = [sys.executable, "-P", "-m", self._module, "--fd", str(theirs.fileno())]
        command += ["--parent", str(os.getpid()), "--bundle", str(self._bundle_dir), "--digest", self._digest]
        command += ["--threads", str(settings.threads), "--memory-limit", str(settings.memory_limit_bytes)]
        command += ["--niceness", str(settings.niceness), "--together", str(settings.together)]
        command += ["--event-cache", str(settings.event_cache_bytes)]
        command += ["--decision-cache", str(settings.decision_cache_bytes)]
        if settings.prefix_dir is not None:
            command += ["--prefix-dir", str(settings.prefix_dir)]
        try:
            with theirs:
                self._child = ChildProcess(command, _environment(), theirs.fileno(), self._on_log)
        except EdgeError:
            ours.close()
            raise
        self._channel = FrameChannel(ours)

    def _ask(self, request: Message, timeout_s: float, progress: Callable[[int, int], None] | None = None) -> Message:
        channel = self._channel
        if channel is None or self._child is None:
            raise TransientError("worker.not_running", "the worker is not running")
        self._requests += 1
        limit_s = timeout_s + self._grace_s
        try:
            try:
                channel.send({**request, "id": self._requests}, timeout_s=limit_s)
            except TransientError as error:
                raise self._died() from error
            message = self._receive(limit_s)
            while "progress" in message and message.get("id") == self._requests:
                if progress is not None and message["progress"][0]:
                    progress(*message["progress"])
                message = self._receive(float(message["step_s"]) + self._grace_s)
        except FrameTimeout:
            self._kill()
            raise TransientError("worker.stuck", f"no answer within {limit_s:g} s; the worker was killed") from None
        if message.get("id") != self._requests:
            self._kill()
            raise TransientError("worker.protocol", "the worker answered another request")
        if "error" in message:
            fault = error_from(message["error"])
            if fault.code in LAST_FAULTS:
                self._end()  # it exits by itself
            raise fault
        return message

    def _receive(self, timeout_s: float) -> Message:
        if self._channel is None:
            raise TransientError("worker.not_running", "the worker is not running")
        try:
            message = self._channel.receive(timeout_s=timeout_s)
        except PermanentError as error:
            self._kill()
            raise TransientError("worker.protocol", f"the worker sent garbage: {error.detail}") from error
        if message is None:
            raise self._died()
        return message

    def _died(self) -> TransientError:
        child = self._child
        self._end()
        if child is None:
            return TransientError("worker.died", "the worker was stopped")
        how, context = child.obituary()
        last = f"; last words: {child.last_lines[-1]}" if child.last_lines else ""
        return TransientError("worker.died", f"the worker was lost: {how}{last}", **context)

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._end()

    def _end(self) -> None:
        """Wait for a process that is ending by itself (or was killed), and take its last lines."""
        if self._channel is not None:
            self._channel.close()
        child = self._child
        if child is not None and not child.wait(STOP_TIMEOUT_S):
            child.kill()
            child.wait(_REAP_TIMEOUT_S)
        self._channel = None


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {
        # Settings may hold the broker's password, which is no business of the process that reads strangers' words.
        **{name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)},
        "ORT_DISABLE_TELEMETRY": "1",
        # The worker runs this very package, installed or in a working tree, and nothing from the current folder.
        "PYTHONPATH": f"{_PACKAGE_ROOT}{os.pathsep}{path}" if path else str(_PACKAGE_ROOT),
        "PYTHONUNBUFFERED": "1",
    }
