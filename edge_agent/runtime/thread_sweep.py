"""How many threads decide fastest here: measured on this machine with this model, and not guessed.

A small model is bound by memory, so more threads may be slower, and where they are faster it is soon by little. Taken
is the smallest count within 5 % of the best: what it leaves is for the plant's other software.

Counts are measured one at a time, each in a worker process of its own: two of them beside the serving one may be more
than a gateway holds. They are visited upwards and then downwards, so that a machine which slows down (heat, other
work) slows down all of them alike.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Protocol

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import load_golden, load_task
from edge_agent.errors import TransientError
from edge_agent.runtime.answer import Answer, WorkerFacts, percentile

NEARLY_BEST = 1.05
VISIT_S = 1.0
# Beyond these a model of this size gains nothing anywhere, and every count costs two loads.
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
_LEAST_DECISIONS = 5
_WARM_UP_DECISIONS = 2


class SweptWorker(Protocol):
    """What a sweep needs of a worker process."""

    def start(self) -> WorkerFacts:
        """Load the bundle; raises EdgeError."""
        ...

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        """Answer one event; raises EdgeError."""
        ...

    def stop(self) -> None:
        """End the process, from any thread."""
        ...


@dataclass(frozen=True)
class Job:
    """One decision to measure: an event of a task, within the task's deadline."""

    task: str
    event: Event
    deadline_s: float


@dataclass
class Measured:
    """What one count did.

    Args:
        threads: intra-op threads.
        visits_ms: latencies of every visit's decisions, as the worker measured them.
    """

    threads: int
    visits_ms: list[list[float]] = field(default_factory=list)

    @property
    def p50_ms(self) -> float:
        """Mean of the visits' medians, so that the quicker visit does not outvote the slower one; 0 without a visit."""
        return fmean(percentile(visit, 0.5) for visit in self.visits_ms) if self.visits_ms else 0.0

    @property
    def p95_ms(self) -> float:
        """95th percentile over all visits."""
        return percentile([*itertools.chain(*self.visits_ms)], 0.95)

    @property
    def decisions(self) -> int:
        """How many were measured."""
        return sum(map(len, self.visits_ms))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def counts_for(cores: int) -> tuple[int, ...]:
    """Thread counts worth measuring on a machine with so many cores."""
    return tuple(count for count in _COUNTS if count <= cores) or (1,)


def golden_jobs(bundle: Path) -> list[Job]:
    """The golden examples of a bundle whose files were verified, as work to measure with.

    Raises:
        EdgeError: ``task.*``, ``bundle.*``.
    """
    manifest, _ = read_manifest(bundle)
    listed = {entry.path for entry in manifest.files}
    jobs = []
    for name in manifest.tasks:
        spec = load_task(bundle / "tasks" / name / "task.yaml")
        # Only listed files were verified, so only they are read.
        if f"tasks/{name}/golden.jsonl" in listed:
            golden = load_golden(bundle / "tasks" / name / "golden.jsonl", spec)
            jobs += [Job(name, dict(example.event), spec.deadline_ms / 1000) for example in golden]
    return jobs


def sweep(
    worker_with: Callable[[int, float], SweptWorker],
    jobs: Sequence[Job],
    counts: Sequence[int],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Measured]:
    """Measure decisions with each count of threads.

    Args:
        worker_with: makes a worker with so many threads, which may take so many seconds to start.
        jobs: decided in turn, over and over.
        counts: in ascending order.
        budget_s: for everything, loading included; what is under way then is still finished.
        clock: monotonic seconds.

    Returns:
        One entry a count, in the order of ``counts``; where the time was too short, entries without visits.

    Raises:
        EdgeError: what a worker raised.
    """
    end_s = clock() + budget_s
    table = {count: Measured(count) for count in counts}
    # Upwards, then downwards; at the turn the highest count stays for both of its visits.
    visits = [(count, VISIT_S) for count in counts[:-1]]
    visits += [(counts[-1], 2 * VISIT_S), *reversed(visits)]
    for count, visit_s in visits:
        left_s = end_s - clock()
        if left_s <= 0:
            break
        worker = worker_with(count, left_s)
        try:
            worker.start()
            table[count].visits_ms.append(_visit(worker, jobs, visit_s, clock))
        except TransientError:
            if clock() < end_s:
                raise
            # It was given no longer than what was left.
            break
        finally:
            worker.stop()
    return list(table.values())


def choose_threads(table: Sequence[Measured]) -> int | None:
    """The smallest count within 5 % of the best median; None where not every count was measured."""
    if not all(measured.visits_ms for measured in table):
        return None
    best_ms = min(measured.p50_ms for measured in table)
    return min(measured.threads for measured in table if measured.p50_ms <= best_ms * NEARLY_BEST)


def _visit(worker: SweptWorker, jobs: Sequence[Job], visit_s: float, clock: Callable[[], float]) -> list[float]:
    endless = itertools.cycle(jobs)
    for job in itertools.islice(endless, _WARM_UP_DECISIONS):
        worker.decide(job.task, job.event, job.deadline_s)
    latencies_ms: list[float] = []
    end_s = clock() + visit_s
    while len(latencies_ms) < _LEAST_DECISIONS or clock() < end_s:
        job = next(endless)
        latencies_ms.append(worker.decide(job.task, job.event, job.deadline_s).latency_ms)
    return latencies_ms
