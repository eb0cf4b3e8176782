"""Power cuts in every state of an update."""

from __future__ import annotations

import json
import threading

import pytest

from edge_agent.update.machine import RULES
from edge_agent.update.ports import ProbationCounts
from tests.fakes.release_simulator import Published
from tests.fakes.update_ports import GOOD_SERVICE, PowerCut
from tests.update.conftest import Device, publish


@pytest.mark.parametrize("phase", ["downloading", "verifying", "installing", "trial", "probation", "committing"])
def test_power_cut_in_a_state_boots_the_old_model_and_completes_the_update(
    device: Device, v1: Published, phase: str
) -> None:
    v2 = publish(device, "2.0")
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while json.loads((device.state_dir / "update.json").read_bytes())["phase"] != phase:
        assert device.updater.advance()
    device.boot()
    # a commit that was decided is finished at boot; before that the old model serves
    assert device.ports.serving == (v2.digest if phase == "committing" else v1.digest)
    device.settle()
    assert (device.state, device.active_version, device.ports.serving) == ("committed", "2.0", v2.digest)


def test_power_cut_while_rolling_back_serves_the_old_model_and_ends_rolled_back(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.ports.service[v2.digest] = ProbationCounts(decisions=40, errors=2, worker_deaths=0, p95_ms=50.0)
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while device.state != "rolling_back":
        device.updater.advance()
    device.boot()
    device.settle()
    assert (device.state, device.ports.serving) == ("rolled_back", v1.digest)


@pytest.mark.parametrize(("deaths_max", "code"), [(1, "probation.worker_deaths"), (100, "update.loop_guard")])
def test_a_candidate_that_takes_the_machine_down_in_probation_is_rolled_back(
    device: Device, v1: Published, deaths_max: int, code: str
) -> None:
    v2 = publish(device, "2.0")
    crashes = 0

    def machine_goes_down() -> ProbationCounts:
        nonlocal crashes
        crashes += 1
        raise PowerCut

    device.boot(probation_worker_deaths_max=deaths_max)
    device.ports.service[v2.digest] = machine_goes_down
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while device.state != "rolled_back":
        try:
            device.settle()
        except PowerCut:
            if crashes == deaths_max + 1 and code == "probation.worker_deaths":
                device.ports.service[v2.digest] = GOOD_SERVICE  # too late: it had its chances
            device.boot()
            assert device.ports.serving == v1.digest
    assert (device.state, device.error_code, device.active_version) == ("rolled_back", code, "1.0")
    assert crashes <= RULES["probation"].resumes + 1


def test_a_candidate_that_takes_the_machine_down_in_its_trial_is_given_up(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while device.state != "trial":
        device.updater.advance()
    for _ in range(RULES["trial"].resumes + 1):
        device.boot()
    assert (device.state, device.error_code) == ("failed", "update.loop_guard")
    device.order(device.simulator.order(v2, rev=3))
    assert device.error_code == "update.known_bad"


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 4096, b'{"phase": "trial"}', b"[]", b'{"phase": "dancing"}'])
def test_a_corrupt_state_file_is_reported_and_leaves_the_active_slot_as_it_is(
    device: Device, v1: Published, damage: bytes
) -> None:
    v2 = publish(device, "2.0")
    envelope = device.simulator.order(v2, rev=2)
    device.updater.on_desired(envelope)
    while device.state != "trial":
        device.updater.advance()
    (device.state_dir / "update.json").write_bytes(damage)
    device.boot()
    assert (device.state, device.error_code, device.ports.serving) == ("idle", "update.state_corrupt", v1.digest)
    device.order(envelope)  # the retained order comes again with the next connection
    assert (device.state, device.active_version) == ("committed", "2.0")


def test_a_stop_on_purpose_is_not_held_against_the_candidate(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while device.state != "probation":
        device.updater.advance()
    for _ in range(6):
        stop = threading.Event()
        stop.set()
        device.updater.run(stop)
        device.boot()
    device.settle()
    assert (device.state, device.active_version) == ("committed", "2.0")
