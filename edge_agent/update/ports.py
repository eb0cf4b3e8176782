"""What the updater needs from the rest of the agent, and the words in which it is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edge_agent.contract.messages import Reported


@dataclass(frozen=True)
class TrialResult:
    """How a candidate did in a side worker on this device.

    Args:
        passed: the runner's own verdict (it loaded, every golden example was right).
        golden_total: golden examples that were run.
        golden_wrong: golden examples answered wrongly.
        p95_ms: 95th percentile of latency over them; None when nothing was measured.
        peak_rss_bytes: largest resident size of the side worker; None where it cannot be read.
        detail: one sentence for a person.
    """

    passed: bool
    golden_total: int
    golden_wrong: int
    p95_ms: float | None
    peak_rss_bytes: int | None
    detail: str


@dataclass(frozen=True)
class ProbationCounts:
    """What the candidate did in service, cumulative since the swap.

    Args:
        decisions: events answered.
        errors: events that failed in the worker; not contained in ``decisions``.
        worker_deaths: times that the serving worker died.
        p95_ms: 95th percentile of latency over the last window; None while there is none.
    """

    decisions: int
    errors: int
    worker_deaths: int
    p95_ms: float | None


class UpdaterPorts(Protocol):
    """Implemented by the agent; called on the updater's thread only."""

    def trial(self, bundle_dir: Path, digest: str) -> TrialResult:
        """Run a second worker on the candidate's golden examples; the serving one keeps serving.

        Raises:
            EdgeError: the candidate could not be run.
        """
        ...

    def swap(self, bundle_dir: Path, digest: str) -> None:
        """Make the serving worker use this bundle. A no-op where it does already.

        Raises:
            EdgeError: and the previous bundle keeps serving.
        """
        ...

    def withdraw(self) -> None:
        """Stop serving: the first bundle ever installed failed its probation and there is none to go back to."""
        ...

    def probation(self) -> ProbationCounts:
        """Counts since the last `swap`."""
        ...

    def report(self, reported: Reported) -> None:
        """Publish ``model/reported``; must not block."""
        ...


class Checkpoint(Protocol):
    """Called often inside long work; the only way in which it is stopped."""

    def __call__(self, progress: float | None = None) -> None:
        """Note progress (0..1 of the present state).

        Raises:
            Interrupted: the work is to be left as it is; what is on disk is resumable.
        """
        ...


class Interrupted(Exception):  # noqa: N818 - not an error: the work was called off
    """Work was called off: the daemon stops, a newer desired state supersedes it, or its time is up."""

    def __init__(self, reason: Literal["stop", "superseded", "deadline"]) -> None:
        super().__init__(reason)
        self.reason = reason
