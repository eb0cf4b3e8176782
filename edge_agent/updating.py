"""The updater's ports, joined to the worker and the uplink: how a candidate is tried, swapped in and watched."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil

from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.messages import Reported
from edge_agent.errors import TransientError
from edge_agent.log import get_logger
from edge_agent.runtime.answer import GoldenOutcome, WorkerFacts
from edge_agent.runtime.serving import ServingWorker, worker_on
from edge_agent.runtime.thread_choice import ThreadChoice
from edge_agent.update.ports import Interrupted, ProbationCounts, TrialResult

_log = get_logger(__name__)
# Left to the rest of the machine while two models are loaded side by side.
_SPARE_BYTES = 64 << 20


class SideWorker(Protocol):
    """What a trial needs of a worker process."""

    def start(self) -> WorkerFacts:
        """Load the bundle; raises EdgeError."""
        ...

    def run_golden(self) -> GoldenOutcome:
        """Answer the bundle's golden examples; raises EdgeError."""
        ...

    def stop(self) -> None:
        """End the process, from any thread."""
        ...


class ModelExchange:
    """Implements `edge_agent.update.ports.UpdaterPorts`.

    Args:
        serving: the worker that answers now.
        threads: the worker section with the thread counts of this device; a trial measures the candidate's.
        publish: takes every report.
        announce: called when another model answers, or none.
        available_bytes: memory that a second worker may use; default: what the kernel says is available.
        side_worker: starts the worker of a trial; the default starts a real process.
    """

    def __init__(
        self,
        serving: ServingWorker,
        threads: ThreadChoice,
        publish: Callable[[Reported], None],
        announce: Callable[[], None],
        available_bytes: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
        side_worker: Callable[[Path, str], SideWorker] | None = None,
    ) -> None:
        self._serving = serving
        self._side_worker = side_worker or (
            lambda bundle, digest: worker_on(bundle, digest, threads.settings_for(digest))
        )
        self._threads = threads
        self._side: SideWorker | None = None
        self._stopping = threading.Event()
        self._publish = publish
        self._announce = announce
        self._available_bytes = available_bytes

    def trial(self, bundle_dir: Path, digest: str) -> TrialResult:
        """Load the candidate in a side worker and run its golden examples; of one that passes, measure thread counts.

        Where memory cannot hold both models the serving worker makes room, and events wait in the inbox.

        Raises:
            EdgeError: the candidate could not be run.
            Interrupted: the trial was cut off by `stop_trial`.
        """
        with self._room_for(bundle_dir, digest) as is_beside:
            self._side = worker = self._side_worker(bundle_dir, digest)
            try:
                worker.start()
                outcome = worker.run_golden()
            except TransientError as error:
                if self._stopping.is_set():
                    raise Interrupted("stop") from error
                # A candidate whose worker dies or hangs on a golden example is not worth a retry: they are fixed.
                return TrialResult(False, 0, 0, None, None, str(error))
            finally:
                self._side = None
                worker.stop()
            # Not where events wait for the memory: an outage is not made longer for a few per cent of speed.
            if is_beside and outcome.total and not outcome.wrong:
                self._threads.sweep(bundle_dir, digest)
        if self._stopping.is_set():
            raise Interrupted("stop")
        if outcome.wrong:
            detail = f"first, example {outcome.wrong[0].index} of {outcome.wrong[0].task}"
        else:
            detail = "" if outcome.total else "the bundle has no golden examples"
        return TrialResult(
            passed=outcome.total > 0 and not outcome.wrong,
            golden_total=outcome.total,
            golden_wrong=len(outcome.wrong),
            p95_ms=outcome.p95_ms,
            peak_rss_bytes=outcome.peak_rss_bytes,
            detail=detail,
        )

    def stop_trial(self) -> None:
        """End a trial under way, from any thread: the daemon stops. That says nothing about the candidate."""
        self._stopping.set()
        self._threads.stop()
        side = self._side
        if side is not None:
            side.stop()

    def swap(self, bundle_dir: Path, digest: str) -> None:
        """Serve ``bundle_dir`` from the next event on; a no-op where it is served already.

        Where memory cannot hold both models the old one ends first, and comes back when the new one does not start.

        Raises:
            EdgeError: the new worker did not start; the old one keeps serving.
        """
        model = self._serving.model
        if model is not None and model.ref.digest == digest and model.bundle == bundle_dir:
            return
        with self._room_for(bundle_dir, digest):
            self._serving.exchange(bundle_dir, digest)
        facts = self._serving.last_facts
        _log.info(
            "model_in_service", bundle=str(bundle_dir), digest=digest[:12], threads=facts.threads if facts else None
        )
        self._announce()

    @contextlib.contextmanager
    def _room_for(self, bundle_dir: Path, digest: str) -> Iterator[bool]:
        """Pause the serving worker where memory cannot hold a second model beside it; whether it could."""
        manifest, _ = read_manifest(bundle_dir)
        is_tight = self._available_bytes() < manifest.resources.ram_bytes + _SPARE_BYTES
        if self._serving.model is None or not is_tight:
            yield True
            return
        _log.warning("no_memory_for_two_models", digest=digest[:12])
        self._serving.pause()
        try:
            yield False
        finally:
            self._serving.resume()

    def withdraw(self) -> None:
        """Stop serving: the only bundle ever installed turned out bad."""
        self._serving.stop()
        self._announce()

    def probation(self) -> ProbationCounts:
        """Counts since the last swap."""
        counts = self._serving.counts()
        return ProbationCounts(counts.decisions, counts.errors, counts.worker_deaths, counts.latency_ms(0.95))

    def report(self, reported: Reported) -> None:
        """Hand a report to the uplink (the updater has logged it)."""
        self._publish(reported)
