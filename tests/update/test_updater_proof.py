"""What a model must prove before it stays: its trial, then its first hours in service."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.errors import PermanentError, TransientError
from edge_agent.update.ports import ProbationCounts, TrialResult
from tests.fakes.release_simulator import Published
from tests.fakes.update_ports import GOOD_TRIAL
from tests.update.conftest import Device, publish

BAD_TRIALS: dict[str, TrialResult | PermanentError] = {
    "trial.golden_wrong": replace(GOOD_TRIAL, passed=False, golden_wrong=2),
    "trial.failed": replace(GOOD_TRIAL, passed=False, detail="no such provider"),
    "trial.too_slow": replace(GOOD_TRIAL, p95_ms=2000.1),
    "trial.too_large": replace(GOOD_TRIAL, peak_rss_bytes=(2 << 30) + 1),
    "bundle.unsupported": PermanentError("bundle.unsupported", "needs a newer runtime"),
}


@pytest.mark.parametrize("code", BAD_TRIALS)
def test_a_candidate_that_fails_its_trial_never_serves(device: Device, v1: Published, code: str) -> None:
    v2 = publish(device, "2.0")
    device.ports.trials[v2.digest] = BAD_TRIALS[code]
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.error_code, device.active_version) == ("failed", code, "1.0")
    assert device.ports.swaps == []
    assert device.ports.states == ["downloading", "verifying", "installing", "trial", "failed"]


def test_a_trial_worker_that_dies_once_is_tried_again(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    deaths = [TransientError("worker.died", "signal 9")] * 2

    def trial() -> TrialResult:
        if deaths:
            raise deaths.pop()
        return GOOD_TRIAL

    device.ports.trials[v2.digest] = trial
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.active_version) == ("committed", "2.0")


def test_a_trial_worker_that_always_dies_marks_the_model_bad(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.ports.trials[v2.digest] = TransientError("worker.died", "signal 9")
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.error_code, len(device.ports.trial_runs)) == ("failed", "worker.died", 1 + 3)
    device.order(device.simulator.order(v2, rev=3))
    assert device.error_code == "update.known_bad"


BAD_SERVICE = {
    "probation.errors": ProbationCounts(decisions=40, errors=2, worker_deaths=0, p95_ms=50.0),
    "probation.worker_deaths": ProbationCounts(decisions=3, errors=0, worker_deaths=2, p95_ms=50.0),
    "probation.too_slow": ProbationCounts(decisions=30, errors=0, worker_deaths=0, p95_ms=5000.0),
}


@pytest.mark.parametrize("code", BAD_SERVICE)
def test_a_candidate_that_fails_in_service_is_rolled_back(device: Device, v1: Published, code: str) -> None:
    v2 = publish(device, "2.0")
    device.ports.service[v2.digest] = BAD_SERVICE[code]
    device.order(device.simulator.order(v2, rev=2, probation_decisions=50))
    assert (device.state, device.error_code, device.active_version) == ("rolled_back", code, "1.0")
    assert device.ports.swaps == [v2.digest, v1.digest]
    assert device.ports.states[-3:] == ["probation", "rolling_back", "rolled_back"]
    assert device.updater.slots.previous() is None


def test_a_digest_that_failed_here_is_refused_until_an_order_says_to_try_again(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.ports.service[v2.digest] = BAD_SERVICE["probation.errors"]
    envelope = device.simulator.order(v2, rev=2)
    device.order(envelope)
    device.ports.service.clear()
    device.order(envelope)
    assert (device.state, len(device.ports.swaps)) == ("rolled_back", 2)
    device.order(device.simulator.order(v2, rev=3))
    assert (device.state, device.error_code) == ("failed", "update.known_bad")
    device.order(device.simulator.order(v2, rev=4, retry_bad=True))
    assert (device.state, device.active_version) == ("committed", "2.0")


def test_the_first_bundle_ever_that_fails_in_service_is_withdrawn(device: Device) -> None:
    v1 = publish(device, "1.0")
    device.ports.service[v1.digest] = BAD_SERVICE["probation.worker_deaths"]
    device.order(device.simulator.order(v1, rev=1))
    assert (device.state, device.active_version, device.ports.serving) == ("rolled_back", None, None)


def test_too_few_events_in_a_week_neither_commit_nor_blame(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")

    def a_quiet_hour() -> ProbationCounts:
        device.clock.elapsed_s += 3600.0
        return ProbationCounts(decisions=1, errors=0, worker_deaths=0, p95_ms=None)

    device.ports.service[v2.digest] = a_quiet_hour
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.error_code) == ("rolled_back", "update.probation_inconclusive")
    assert device.ports.serving == v1.digest
    assert device.clock.elapsed_s > 7 * 86_400


def test_a_swap_that_fails_keeps_the_old_model_and_rolls_back(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.ports.swap_errors = [PermanentError("worker.out_of_memory", "2 GB needed")]
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.error_code) == ("rolled_back", "worker.out_of_memory")
    assert device.ports.serving == v1.digest


def test_a_rollback_that_fails_is_named_and_healed_by_the_next_order(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.ports.service[v2.digest] = BAD_SERVICE["probation.errors"]
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while not device.ports.swaps:
        device.updater.advance()
    device.ports.swap_errors = [PermanentError("worker.start_failed", "port in use")]
    device.settle()
    assert (device.state, device.error_code) == ("failed", "update.rollback_failed")
    assert device.ports.serving == v2.digest
    device.order(device.simulator.order(v1, rev=3))
    assert (device.state, device.ports.serving) == ("committed", v1.digest)
