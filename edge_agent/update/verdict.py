"""What a candidate must prove: pure rules over trial results and probation counts."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.contract.messages import DesiredState
from edge_agent.errors import PermanentError
from edge_agent.settings import UpdateSettings
from edge_agent.update.ports import ProbationCounts, TrialResult

# Below this many events a 95th percentile is the maximum of a handful.
_P95_SAMPLE = 20


def check_trial(result: TrialResult, limits: UpdateSettings) -> None:
    """Accept a trial or say why not.

    Raises:
        PermanentError: ``trial.golden_wrong``, ``trial.failed``, ``trial.too_slow``, ``trial.too_large``.
    """
    if result.golden_wrong:
        detail = f"{result.golden_wrong} of {result.golden_total} golden examples answered wrongly: {result.detail}"
        raise PermanentError("trial.golden_wrong", detail)
    if not result.passed:
        raise PermanentError("trial.failed", result.detail)
    if result.p95_ms is not None and result.p95_ms > limits.trial_p95_ms_max:
        detail = f"p95 {result.p95_ms:.0f} ms on golden examples, {limits.trial_p95_ms_max:.0f} ms allowed"
        raise PermanentError("trial.too_slow", detail)
    if result.peak_rss_bytes is not None and result.peak_rss_bytes > limits.trial_rss_bytes_max:
        detail = f"peak memory {result.peak_rss_bytes} bytes, {limits.trial_rss_bytes_max} allowed"
        raise PermanentError("trial.too_large", detail)


@dataclass(frozen=True)
class Outlook:
    """A probation that goes on, or is passed.

    Args:
        passed: enough was seen and it was good enough.
        progress: 0..1, the smaller of events and time.
    """

    passed: bool
    progress: float


def judge_probation(
    counts: ProbationCounts, order: DesiredState, limits: UpdateSettings, *, elapsed_s: float, crashes: int
) -> Outlook:
    """Judge a candidate in service.

    Passing takes ``order.probation_decisions`` decisions *and* ``order.probation_s`` seconds. Failing does not wait:
    it comes as soon as the limits cannot be met any more.

    Args:
        counts: cumulative since the swap.
        order: says how many decisions and seconds.
        limits: error rate, worker deaths, p95.
        elapsed_s: since the swap.
        crashes: times that the whole agent went down in this probation; each counts as a worker death.

    Raises:
        PermanentError: ``probation.worker_deaths``, ``probation.errors``, ``probation.too_slow``.
    """
    deaths = counts.worker_deaths + crashes
    if deaths > limits.probation_worker_deaths_max:
        detail = f"{deaths} worker deaths ({crashes} with the agent), {limits.probation_worker_deaths_max} allowed"
        raise PermanentError("probation.worker_deaths", detail)
    events = counts.decisions + counts.errors
    # As if every event that is still to come were answered: then one bad event at the start is not yet 100 %.
    at_best = counts.errors / max(events, order.probation_decisions)
    if at_best > limits.probation_error_rate_max:
        detail = f"{counts.errors} of {events} events failed, {limits.probation_error_rate_max:.1%} allowed"
        raise PermanentError("probation.errors", detail)
    enough = counts.decisions >= order.probation_decisions
    slow = counts.p95_ms is not None and counts.p95_ms > limits.probation_p95_ms_max
    if slow and (enough or counts.decisions >= _P95_SAMPLE):
        detail = (
            f"p95 {counts.p95_ms:.0f} ms over {counts.decisions} decisions, {limits.probation_p95_ms_max:.0f} allowed"
        )
        raise PermanentError("probation.too_slow", detail)
    progress = min(counts.decisions / order.probation_decisions, elapsed_s / order.probation_s, 1.0)
    return Outlook(passed=enough and elapsed_s >= order.probation_s, progress=progress)
