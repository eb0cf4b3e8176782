"""The serving worker: one inference process kept alive, counted and exchangeable while events flow.

States: *empty* (no model installed yet), *serving*, *down* (the worker died and waits out its backoff). Deciding and
exchanging exclude each other, so an event is answered wholly by the old model or wholly by the new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import Manifest, read_manifest
from edge_agent.contract.messages import ModelRef, model_ref
from edge_agent.contract.task import TaskSpec, load_task
from edge_agent.errors import EdgeError, IntegrityError, TransientError
from edge_agent.log import get_logger
from edge_agent.runtime.answer import Answer, WorkerFacts, percentile
from edge_agent.runtime.memory import rss_bytes
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings

FIRST_BACKOFF_S = 0.2
# What a worker may grow by, resident, before it is taken to leak: an event's buffers are a fraction of this.
SPARE_RSS_BYTES = 256 << 20
_LATENCY_WINDOW = 512
_log = get_logger(__name__)


class Worker(Protocol):
    """What serving needs of a worker process."""

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        ...

    def start(self) -> WorkerFacts:
        """Load the bundle; raises EdgeError."""
        ...

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        """Answer one event; raises EdgeError."""
        ...

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        """Answer events that wait, each with its answer or its own fault; raises EdgeError when all are lost."""
        ...

    def stop(self) -> None:
        """End the process."""
        ...


WorkerFactory = Callable[[Path, str], Worker]


@dataclass(frozen=True)
class ServedModel:
    """The model that answers: its bundle directory, identity and tasks."""

    bundle: Path
    ref: ModelRef
    manifest: Manifest
    tasks: dict[str, TaskSpec]


@dataclass
class ServingCounts:
    """Counted since the last exchange of the model."""

    decisions: int = 0
    errors: int = 0
    worker_deaths: int = 0
    passes: int = 0
    latencies_ms: list[float] = field(default_factory=list)

    def latency_ms(self, share: float) -> float | None:
        """Percentile over the newest decisions (at most `_LATENCY_WINDOW`); None before the first."""
        return percentile(self.latencies_ms, share) if self.latencies_ms else None


def worker_on(bundle: Path, digest: str, settings: WorkerSettings) -> WorkerProcess:
    """A worker process whose output goes to the log."""
    return WorkerProcess(bundle, digest, settings, on_log=lambda line: _log.info("worker_says", line=line))


class ServingWorker:
    """Keeps the active bundle's worker running.

    Args:
        settings: the worker section.
        factory: starts a worker on a bundle directory; the default starts a real process.

    Attributes:
        deaths_total: since the start of the agent.
        outgrown_total: of these, workers that were ended because they had grown too large.
        last_facts: what the newest worker loaded.
        start_fault: why the last restart failed; None once a worker runs again.
    """

    def __init__(self, settings: WorkerSettings, factory: WorkerFactory | None = None) -> None:
        self._settings = settings
        self._factory = factory or (lambda bundle, digest: worker_on(bundle, digest, settings))
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._model: ServedModel | None = None
        self._counts = ServingCounts()
        self._backoff_s = FIRST_BACKOFF_S
        self._retry_at_s = 0.0
        self._paused = False
        self.deaths_total = 0
        self.outgrown_total = 0
        self.last_facts: WorkerFacts | None = None
        self.start_fault: EdgeError | None = None

    @property
    def model(self) -> ServedModel | None:
        """The model that answers now, or None before the first install."""
        return self._model

    @property
    def ready(self) -> bool:
        """Whether an event could be decided right now or after a restart that is due."""
        if self._model is None or self._paused:
            return False
        worker = self._worker
        return (worker is not None and worker.alive) or time.monotonic() >= self._retry_at_s

    def exchange(self, bundle: Path, digest: str) -> None:
        """Start a worker on ``bundle`` and let it answer from the next event on; the old one serves until then.

        Raises:
            EdgeError: the new worker did not start; the old one keeps serving.
        """
        fresh = self._factory(bundle, digest)
        try:
            # The worker hashes every file first: nothing of the bundle is read here before that.
            facts = fresh.start()
            model = _read_model(bundle, digest)
        except EdgeError:
            fresh.stop()
            raise
        with self._lock:
            old, self._worker = self._worker, fresh
            self._model, self._counts, self.last_facts = model, ServingCounts(), facts
            self._backoff_s, self._retry_at_s, self._paused = FIRST_BACKOFF_S, 0.0, False
            self.start_fault = None
        if old is not None:
            old.stop()

    def pause(self) -> None:
        """Stop the worker to free its memory (a trial on a machine that cannot hold two models)."""
        with self._lock:
            self._paused = True
            self._stop_worker()

    def resume(self) -> None:
        """End a `pause`; the worker starts with the next event."""
        with self._lock:
            self._paused = False
            self._retry_at_s = 0.0

    def decide(self, task: str, event: Event, deadline_s: float) -> tuple[Answer, ModelRef]:
        """Answer one event, restarting a dead worker first when its backoff has passed.

        Returns:
            The answer, and the model that gave it (an exchange may come between two calls).

        Raises:
            TransientError: ``worker.not_ready`` (no model yet, paused, waiting out a backoff, or a start that failed:
                the worker never saw the event); ``worker.died``, ``worker.stuck``, ``worker.protocol`` and the
                `LAST_FAULTS`: it was lost over this event, which may be tried again.
            RefusedError: the event or task is at fault.
            PermanentError: the model is at fault (``worker.deadline``).
        """
        with self._lock:
            worker, model = self._running_worker()
            try:
                answer = worker.decide(task, event, deadline_s)
            except EdgeError as error:
                self._count_failure(worker, error)
                self._end_outgrown()
                raise
            self._count_answer(answer)
            self._end_outgrown()
            return answer, model.ref

    def decide_many(
        self, task: str, events: Sequence[Event], deadline_s: float
    ) -> tuple[list[Answer | EdgeError], ModelRef]:
        """Answer events that wait, as `decide` would each of them.

        Returns:
            For each event its answer or its own fault, and the model that gave them.

        Raises:
            TransientError: as `decide`: the worker was lost over one of them, nobody knows which.
            RefusedError: ``task.unknown``.
        """
        with self._lock:
            worker, model = self._running_worker()
            try:
                found = worker.decide_many(task, events, deadline_s)
            except EdgeError as error:
                self._count_failure(worker, error)
                self._end_outgrown()
                raise
            for one in found:
                if isinstance(one, EdgeError):
                    self._count_failure(worker, one)
                else:
                    self._count_answer(one)
            self._end_outgrown()
            return found, model.ref

    @property
    def together(self) -> int:
        """Events that the model can answer together; 1 before it is known."""
        return self.last_facts.together if self.last_facts is not None else 1

    def keep_alive(self) -> None:
        """Restart a worker that died between two events, so that the next event does not pay for the load.

        Raises:
            TransientError: ``worker.not_ready`` while nothing can be started yet, or the restart failed.
        """
        with self._lock:
            self._running_worker()

    def counts(self) -> ServingCounts:
        """A copy of the counts since the last exchange."""
        with self._lock:
            counts = self._counts
            return ServingCounts(
                counts.decisions, counts.errors, counts.worker_deaths, counts.passes, list(counts.latencies_ms)
            )

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        worker = self._worker
        return None if worker is None else worker.pid

    def stop(self) -> None:
        """Stop the worker and forget the model: nothing is answered until the next `exchange`."""
        with self._lock:
            self._stop_worker()
            self._model = None

    def _running_worker(self) -> tuple[Worker, ServedModel]:
        if self._model is None or self._paused:
            raise TransientError(
                "worker.not_ready", "no model is installed" if not self._paused else "paused for a trial"
            )
        if self._worker is not None and self._worker.alive:
            return self._worker, self._model
        if self._worker is not None:
            # It died between two events: nobody saw an exception, so it is counted here.
            self._count_death()
        if time.monotonic() < self._retry_at_s:
            raise TransientError("worker.not_ready", "the worker died and waits to be restarted")
        worker = self._factory(self._model.bundle, self._model.ref.digest)
        try:
            self.last_facts = worker.start()
        except EdgeError as error:
            worker.stop()
            self._count_death()
            self.start_fault = error
            # Under its own code the fault would be taken for one of the event that happened to come next.
            raise TransientError("worker.not_ready", f"the worker did not start: {error}", cause=error.code) from error
        self._worker, self.start_fault = worker, None
        return worker, self._model

    def _count_answer(self, answer: Answer) -> None:
        counts = self._counts
        counts.decisions += 1
        counts.passes += answer.passes
        counts.latencies_ms.append(answer.latency_ms)
        del counts.latencies_ms[:-_LATENCY_WINDOW]
        self._backoff_s = FIRST_BACKOFF_S

    def _count_failure(self, worker: Worker, error: EdgeError) -> None:
        if not worker.alive:
            self._count_death()
        if error.kind != "refused":
            # A refused event is the sender's fault and says nothing about the model.
            self._counts.errors += 1

    def _end_outgrown(self) -> None:
        """End a worker that leaks: here, between two events, where none is lost by it."""
        pid = None if self._worker is None else self._worker.pid
        size = None if pid is None else rss_bytes(pid)
        if size is None or self.last_facts is None:
            return
        loaded = self.last_facts.rss_bytes
        limit = self._settings.rss_limit_bytes or loaded + max(loaded // 2, SPARE_RSS_BYTES)
        if size > limit:
            _log.error("worker_outgrown", rss_bytes=size, limit_bytes=limit, loaded_bytes=loaded)
            self.outgrown_total += 1
            # A death like any other: in probation it counts against the candidate.
            self._count_death()

    def _count_death(self) -> None:
        self._counts.worker_deaths += 1
        self.deaths_total += 1
        self._stop_worker()
        self._retry_at_s = time.monotonic() + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, self._settings.restart_backoff_max_s)

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


def _read_model(bundle: Path, digest: str) -> ServedModel:
    manifest, found = read_manifest(bundle)
    if found != digest:
        raise IntegrityError("bundle.digest_mismatch", f"expected {digest[:12]}, found {found[:12]}")
    tasks = {name: load_task(bundle / "tasks" / name / "task.yaml") for name in manifest.tasks}
    return ServedModel(bundle, model_ref(manifest, digest), manifest, tasks)
