"""The rest of the agent, as the updater sees it, and a clock that passes when one waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edge_agent.contract.manifest import read_manifest, verify_files
from edge_agent.contract.messages import Reported
from edge_agent.errors import EdgeError
from edge_agent.update.ports import ProbationCounts, TrialResult

GOOD_TRIAL = TrialResult(passed=True, golden_total=3, golden_wrong=0, p95_ms=50.0, peak_rss_bytes=1 << 20, detail="ok")
GOOD_SERVICE = ProbationCounts(decisions=100, errors=0, worker_deaths=0, p95_ms=60.0)


class PowerCut(BaseException):
    """Nothing catches it: the process is gone, and only the disk remains."""


class FakeClock:
    """Time that moves only when someone waits."""

    def __init__(self, wall: datetime) -> None:
        self.wall = wall
        self.elapsed_s = 0.0
        self.waits: list[float] = []

    def monotonic_s(self) -> float:
        return self.elapsed_s

    def now(self) -> datetime:
        return (self.wall + timedelta(seconds=self.elapsed_s)).astimezone(UTC)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        self.elapsed_s += max(timeout_s, 0.0)
        return event.is_set()


@dataclass
class FakePorts:
    """Loads bundles as a worker would (every file hashed), serves nothing.

    Args:
        trials: digest -> result or error of its trial, or what to call for one; `GOOD_TRIAL` otherwise.
        service: digest -> counts in probation, or what to call for them; `GOOD_SERVICE` otherwise.
        swap_errors: errors that the next swaps raise, in order.
    """

    trials: dict[str, TrialResult | EdgeError | Callable[[], TrialResult]] = field(default_factory=dict)
    service: dict[str, ProbationCounts | Callable[[], ProbationCounts]] = field(default_factory=dict)
    swap_errors: list[EdgeError] = field(default_factory=list)
    serving: str | None = None
    trial_runs: list[str] = field(default_factory=list)
    swaps: list[str] = field(default_factory=list)
    reports: list[Reported] = field(default_factory=list)

    def trial(self, bundle_dir: Path, digest: str) -> TrialResult:
        self.trial_runs.append(digest)
        _load(bundle_dir, digest)
        result = self.trials.get(digest, GOOD_TRIAL)
        if isinstance(result, EdgeError):
            raise result
        return result if isinstance(result, TrialResult) else result()

    def swap(self, bundle_dir: Path, digest: str) -> None:
        if self.swap_errors:
            raise self.swap_errors.pop(0)
        _load(bundle_dir, digest)
        self.swaps.append(digest)
        self.serving = digest

    def withdraw(self) -> None:
        self.serving = None

    def probation(self) -> ProbationCounts:
        counts = self.service.get(self.serving or "", GOOD_SERVICE)
        return counts if isinstance(counts, ProbationCounts) else counts()

    def report(self, reported: Reported) -> None:
        self.reports.append(reported)

    @property
    def states(self) -> list[str]:
        """Reported states without repetition."""
        seen: list[str] = []
        for reported in self.reports:
            if not seen or seen[-1] != reported.state:
                seen.append(reported.state)
        return seen


def _load(bundle_dir: Path, digest: str) -> None:
    manifest, found = read_manifest(bundle_dir)
    assert found == digest
    verify_files(bundle_dir, manifest)
