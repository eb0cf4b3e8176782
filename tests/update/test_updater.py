"""The whole update path on one device: real registry, HTTP, signatures and disk; only the worker is faked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from edge_agent.contract.dsse import generate_key
from edge_agent.contract.manifest import Resources, verify_files
from edge_agent.contract.messages import Reported
from edge_agent.errors import PermanentError, TransientError
from edge_agent.update.machine import RULES, Record
from edge_agent.update.ports import ProbationCounts, TrialResult
from edge_agent.update.updater import Updater
from tests.fakes.release_simulator import Published
from tests.fakes.static_server import Fault, StaticServer
from tests.fakes.update_ports import GOOD_SERVICE, GOOD_TRIAL, FakePorts, PowerCut
from tests.update.conftest import NODE, Device, find_in_this_process

HAPPY_PATH = ["downloading", "verifying", "installing", "trial", "probation", "committed"]


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll another thread's progress; generous, because a machine may be busy."""
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "waited a minute"
        time.sleep(0.01)


def publish(device: Device, version: str, model: bytes | None = None) -> Published:
    return device.simulator.publish("triage", version, {"model/decoder.onnx": model or version.encode() * 5000})


@pytest.fixture
def v1(device: Device) -> Published:
    """Version 1.0 committed under revision 1; reports and swaps so far are forgotten."""
    release = publish(device, "1.0")
    device.order(device.simulator.order(release, rev=1))
    assert device.active_version == "1.0"
    device.ports.reports.clear()
    device.ports.swaps.clear()
    return release


def test_first_update_is_downloaded_tried_proved_and_committed(device: Device) -> None:
    release = publish(device, "1.0")
    device.order(device.simulator.order(release))
    assert device.ports.states == HAPPY_PATH
    assert (device.active_version, device.ports.serving) == ("1.0", release.digest)
    last = device.ports.reports[-1]
    assert (last.rev, last.digest, last.error, last.progress) == (1, release.digest, None, 1.0)


def test_second_update_keeps_the_first_as_previous(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.order(device.simulator.order(v2, rev=2))
    last = device.updater.reported()
    assert last.active is not None
    assert last.previous is not None
    assert (last.active.version, last.previous.version) == ("2.0", "1.0")


def test_while_on_probation_the_candidate_is_reported_as_active_and_the_old_one_as_previous(
    device: Device, v1: Published
) -> None:
    v2 = publish(device, "2.0")
    device.order(device.simulator.order(v2, rev=2))
    watched = [r for r in device.ports.reports if r.state == "probation" and r.active and r.active.version == "2.0"]
    assert watched[0].progress == 0.0  # at once, not only when events have come in
    assert all(r.previous is not None and r.previous.version == "1.0" for r in watched)


def test_only_blobs_that_are_not_there_are_fetched(device: Device, v1: Published, server: StaticServer) -> None:
    server.requests.clear()
    v2 = device.simulator.publish(
        "triage", "2.0", {"model/decoder.onnx": b"1.0" * 5000, "tasks/triage/task.yaml": b"name: triage\n# new\n"}
    )
    device.order(device.simulator.order(v2, rev=2))
    assert device.active_version == "2.0"
    assert len(server.requested("/blobs/")) == 1


def test_the_same_order_again_is_no_work(device: Device, v1: Published, server: StaticServer) -> None:
    server.requests.clear()
    device.order(device.simulator.order(v1, rev=1))
    assert server.requests == []
    assert device.ports.states in ([], ["committed"])


def test_a_newer_revision_of_the_active_digest_commits_without_a_download(
    device: Device, v1: Published, server: StaticServer
) -> None:
    server.requests.clear()
    device.order(device.simulator.order(v1, rev=2))
    assert (device.state, device.updater.reported().rev, server.requests) == ("committed", 2, [])
    assert device.ports.swaps == []


# -- orders that are refused --------------------------------------------------------------------------------------


def test_a_forged_order_changes_nothing(device: Device, v1: Published) -> None:
    genuine, device.simulator.desired_key = device.simulator.desired_key, generate_key()
    device.order(device.simulator.order(publish(device, "2.0"), rev=2))
    assert (device.state, device.error_code, device.active_version) == ("committed", "signature.untrusted", "1.0")
    assert device.updater.reported().rev == 1
    device.simulator.desired_key = genuine
    device.order(device.simulator.order(v1, rev=1))
    assert device.error_code is None


def test_a_replayed_old_revision_changes_nothing(device: Device, v1: Published) -> None:
    old = device.simulator.order(v1, rev=1)
    device.order(device.simulator.order(publish(device, "2.0"), rev=2))
    device.order(old)
    assert (device.state, device.error_code, device.active_version) == ("committed", "update.stale_rev", "2.0")


def test_a_replay_is_refused_also_after_the_journal_was_lost(device: Device, v1: Published) -> None:
    old = device.simulator.order(v1, rev=1)
    device.order(device.simulator.order(publish(device, "2.0"), rev=2))
    (device.state_dir / "update.json").write_bytes(b"\0" * 64)
    device.boot()
    device.order(old)
    assert (device.error_code, device.active_version) == ("update.stale_rev", "2.0")


def test_an_order_for_another_node_changes_nothing(device: Device, v1: Published) -> None:
    device.order(device.simulator.order(publish(device, "2.0"), rev=2, node="press-5"))
    assert (device.state, device.error_code, device.active_version) == ("committed", "update.wrong_node", "1.0")
    assert device.updater.reported().rev == 1


def test_an_expired_order_fails_under_its_own_revision(device: Device, v1: Published) -> None:
    envelope = device.simulator.order(publish(device, "2.0"), rev=2)
    device.clock.wall += timedelta(hours=13)
    device.order(envelope)
    assert (device.state, device.error_code, device.updater.reported().rev) == ("failed", "update.expired", 2)
    assert device.ports.serving == v1.digest


def test_an_order_that_expires_while_the_registry_is_down_is_given_up(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.boot(registry_url="http://127.0.0.1:1")
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    for _ in range(10):
        device.updater.advance()
    assert (device.state, device.error_code) == ("downloading", "trust.registry_unreachable")
    device.clock.wall += timedelta(hours=13)
    device.settle()
    assert (device.state, device.error_code) == ("failed", "update.expired")


def test_a_clock_set_back_does_not_revive_an_expired_order(device: Device, v1: Published) -> None:
    late = publish(device, "2.0")
    device.clock.wall += timedelta(hours=13)
    device.order(device.simulator.order(late, rev=2, not_after=device.clock.now() + timedelta(hours=1)))
    assert device.active_version == "2.0"
    expired = device.simulator.order(publish(device, "3.0"), rev=3)  # until hour 12 of the publisher's day
    device.clock.wall -= timedelta(days=2)
    device.order(expired)
    assert (device.state, device.error_code) == ("failed", "update.expired")


def test_a_downgrade_is_refused_and_allowed_by_the_signed_flag(device: Device, v1: Published) -> None:
    device.order(device.simulator.order(publish(device, "2.0"), rev=2))
    device.order(device.simulator.order(v1, rev=3))
    assert (device.state, device.error_code, device.active_version) == ("failed", "update.downgrade", "2.0")
    device.order(device.simulator.order(v1, rev=4, allow_downgrade=True))
    assert (device.state, device.error_code, device.active_version) == ("committed", None, "1.0")


def test_an_order_whose_digest_is_not_the_registrys_is_refused(device: Device, v1: Published) -> None:
    v2, v3 = publish(device, "2.0"), publish(device, "3.0")
    device.order(device.simulator.order(replace(v2, digest=v3.digest), rev=2))
    assert (device.state, device.error_code) == ("failed", "trust.digest_mismatch")


def test_a_manifest_published_under_another_name_is_refused(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    disguised = device.simulator.publish_manifest("triage/3.0/cpu-x86_64/manifest.json", v2.manifest)
    device.order(device.simulator.order(disguised, rev=2))
    assert (device.state, device.error_code) == ("failed", "trust.manifest_mismatch")


def test_a_cleared_retained_message_orders_nothing(device: Device, v1: Published) -> None:
    device.order(b"")
    assert (device.state, device.error_code) == ("committed", None)


def test_a_release_that_was_never_published_fails(device: Device, v1: Published) -> None:
    device.order(device.simulator.order(replace(v1, path="triage/9.9/cpu-x86_64/manifest.json"), rev=2))
    # the digest is the active one, so nothing needs to be fetched, and nothing changes
    assert device.state == "committed"
    unknown = replace(v1, path="triage/9.9/cpu-x86_64/manifest.json", digest="f" * 64)
    device.order(device.simulator.order(unknown, rev=3))
    assert (device.state, device.error_code) == ("failed", "trust.unknown_release")


# -- what the model must prove ------------------------------------------------------------------------------------

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


# -- a newer order ------------------------------------------------------------------------------------------------


def test_a_newer_order_stops_a_download_that_cannot_finish(device: Device, v1: Published, server: StaticServer) -> None:
    v2, v3 = publish(device, "2.0"), publish(device, "3.0")
    blob = next(e for e in v2.manifest.files if e.path == "model/decoder.onnx")
    server.fault(f"/{blob.sha256}", Fault(status=503, always=True))
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    for _ in range(5):
        device.updater.advance()
    assert (device.state, device.error_code) == ("downloading", "fetch.server_error")
    device.order(device.simulator.order(v3, rev=3))
    assert (device.state, device.active_version) == ("committed", "3.0")


def test_a_newer_order_ends_a_probation_through_the_old_model(device: Device, v1: Published) -> None:
    v2, v3 = publish(device, "2.0"), publish(device, "3.0")
    newer = device.simulator.order(v3, rev=3)

    def newer_order_comes() -> ProbationCounts:
        device.updater.on_desired(newer)
        return GOOD_SERVICE

    device.ports.service[v2.digest] = newer_order_comes
    device.order(device.simulator.order(v2, rev=2, probation_s=3600.0))
    assert device.ports.swaps == [v2.digest, v1.digest, v3.digest]
    assert (device.state, device.active_version) == ("committed", "3.0")
    assert "rolled_back" not in device.ports.states


def test_a_forged_order_does_not_stop_a_download(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    genuine = device.simulator.order(v2, rev=2)
    device.simulator.desired_key = generate_key()
    forged = device.simulator.order(v1, rev=3)
    device.updater.on_desired(genuine)
    device.updater.advance()
    for _ in range(6):
        device.updater.on_desired(forged)
        device.updater.advance()
    device.settle()
    assert device.active_version == "2.0"
    assert device.ports.states.count("downloading") == 1


def test_an_unacceptable_newer_order_does_not_stop_the_older_one(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    device.updater.advance()
    device.order(device.simulator.order(publish(device, "0.5"), rev=3))
    assert (device.state, device.active_version, device.error_code) == ("committed", "2.0", "update.downgrade")


# -- network, disk, clock -----------------------------------------------------------------------------------------


def test_registry_down_until_the_deadline_keeps_the_old_model_serving(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    device.boot(registry_url="http://127.0.0.1:1")
    device.updater.on_desired(device.simulator.order(v2, rev=2, not_after=device.clock.now() + timedelta(days=30)))
    for _ in range(40):
        device.updater.advance()
    assert (device.state, device.ports.serving) == ("downloading", v1.digest)
    assert max(device.clock.waits) <= 2.0  # never so long asleep that a newer order or a stop would wait for it
    device.clock.elapsed_s += RULES["downloading"].deadline_s
    device.settle()
    assert (device.state, device.error_code) == ("failed", "update.deadline")
    error = device.updater.reported().error
    assert error is not None
    assert "trust.registry_unreachable" in error.detail
    assert device.clock.elapsed_s >= RULES["downloading"].deadline_s
    assert device.ports.serving == v1.digest


def test_an_order_that_failed_for_the_registrys_sake_is_tried_again_when_it_comes_again(
    device: Device, v1: Published, server: StaticServer
) -> None:
    envelope = device.simulator.order(publish(device, "2.0"), rev=2)
    server.fault("/metadata/timestamp.json", Fault(status=404))
    device.order(envelope)
    assert (device.state, device.error_code) == ("failed", "trust.registry_incomplete")
    device.order(envelope)
    assert (device.state, device.active_version) == ("committed", "2.0")


def test_a_registry_that_comes_back_is_used(device: Device, v1: Published, server: StaticServer) -> None:
    v2 = publish(device, "2.0")
    server.fault("/metadata/timestamp.json", *[Fault(status=503)] * 3)
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.active_version) == ("committed", "2.0")
    codes = [r.error.code for r in device.ports.reports if r.error]
    assert set(codes) == {"trust.registry_unreachable"}


def test_corrupt_blob_at_the_registry_fails_and_marks_nothing_bad(
    device: Device, v1: Published, server: StaticServer
) -> None:
    v2 = publish(device, "2.0")
    blob = device.simulator.blob_path(b"2.0" * 5000)
    good = blob.read_bytes()
    blob.write_bytes(b"x" * len(good))
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.error_code) == ("failed", "fetch.blob_corrupt")
    blob.write_bytes(good)
    device.order(device.simulator.order(v2, rev=3))
    assert (device.state, device.active_version) == ("committed", "2.0")


def test_a_blob_damaged_on_this_disk_is_found_before_installation_and_fetched_again(
    device: Device, v1: Published, server: StaticServer
) -> None:
    v2 = publish(device, "2.0")
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    while device.state != "verifying":
        device.updater.advance()
    sha256 = hashlib.sha256(b"2.0" * 5000).hexdigest()
    blob = device.state_dir / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o640)
    blob.write_bytes(b"x" * 15_000)
    device.settle()
    assert (device.state, device.active_version) == ("committed", "2.0")
    assert len(server.requested(sha256)) == 2


def damage(bundle: Path) -> None:
    """Change one byte of the weights, as a worn card does; the blob store shares them with the slot."""
    model = bundle / "model" / "decoder.onnx"
    with model.open("r+b") as file:
        file.write(b"\xff")


def test_a_damaged_active_bundle_is_mended_by_a_new_order_for_the_same_release(device: Device, v1: Published) -> None:
    active = device.updater.slots.active()
    assert active is not None
    damage(active.path)
    device.order(device.simulator.order(v1, rev=2))
    assert (device.state, device.active_version, device.ports.serving) == ("committed", "1.0", v1.digest)
    mended = device.updater.slots.active()
    assert mended is not None
    verify_files(mended.path, mended.manifest)


def test_after_falling_back_the_slot_that_answers_is_not_installed_over(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")
    order = device.simulator.order(v2, rev=2)
    device.order(order)
    active = device.updater.slots.active()
    assert active is not None
    damage(active.path)
    updater = device.boot()
    updater.disown_active()
    fallback = updater.slots.active()
    assert fallback is not None
    assert (fallback.digest, fallback.mark) == (v1.digest, "good")
    assert device.updater.reported().active == fallback.ref
    device.ports.serving = v1.digest
    device.order(order)  # retained, so it comes again with the next connection
    assert (device.state, device.active_version) == ("committed", "2.0")
    mended = device.updater.slots.active()
    assert mended is not None
    assert mended.slot == active.slot
    verify_files(mended.path, mended.manifest)
    assert updater.slots.previous() == fallback


def test_an_update_that_cannot_fit_is_refused_with_numbers_before_its_first_byte(
    device: Device, v1: Published, server: StaticServer
) -> None:
    v2 = device.simulator.publish(
        "triage", "2.0", {"model/decoder.onnx": b"2" * 5000}, resources=Resources(disk_bytes=1 << 60, ram_bytes=1)
    )
    server.requests.clear()
    device.updater.on_desired(device.simulator.order(v2, rev=2))
    for _ in range(3):
        device.updater.advance()
    reported = device.updater.reported()
    assert reported.state == "downloading"
    assert reported.error is not None
    assert reported.error.code == "disk.full"
    assert "bytes needed" in reported.error.detail
    assert server.requested("/blobs/") == []


def test_a_bug_ends_the_update_and_not_the_thread(device: Device, v1: Published) -> None:
    v2 = publish(device, "2.0")

    def buggy() -> TrialResult:
        raise ZeroDivisionError

    device.ports.trials[v2.digest] = buggy
    device.order(device.simulator.order(v2, rev=2))
    assert (device.state, device.error_code) == ("failed", "update.internal")
    device.order(device.simulator.order(publish(device, "3.0"), rev=3))
    assert device.active_version == "3.0"


def test_unused_blobs_go_when_the_next_update_needs_room(device: Device, v1: Published) -> None:
    for rev, version in enumerate(["2.0", "3.0", "4.0"], start=2):
        device.order(device.simulator.order(publish(device, version), rev=rev))
    kept = {path.name for path in (device.state_dir / "blobs" / "sha256").glob("??/*")}
    assert hashlib.sha256(b"1.0" * 5000).hexdigest() not in kept
    assert hashlib.sha256(b"4.0" * 5000).hexdigest() in kept


# -- power cuts ---------------------------------------------------------------------------------------------------


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
    device.ports.service[v2.digest] = BAD_SERVICE["probation.errors"]
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


# -- the real thread and the real child process -------------------------------------------------------------------


def test_the_thread_takes_an_order_from_another_thread_and_stops_when_told(device: Device) -> None:
    release = publish(device, "1.0")
    updater = Updater(device.settings, device.state_dir, NODE, device.ports)
    updater.resume()
    stop = threading.Event()
    thread = threading.Thread(target=updater.run, args=(stop,))
    thread.start()
    try:
        updater.on_desired(device.simulator.order(release, probation_s=0.2))
        wait_until(lambda: updater.reported().state == "committed")
    finally:
        stop.set()
        thread.join(timeout=10)
    assert not thread.is_alive()
    assert updater.reported().state == "committed"
    assert Record.model_validate_json((device.state_dir / "update.json").read_bytes()).phase == "committed"


def test_a_report_that_cannot_be_delivered_does_not_end_the_thread(device: Device) -> None:
    release = publish(device, "1.0")
    failures = [OSError("no uplink"), OSError("no uplink")]

    class DeafPorts(FakePorts):
        def report(self, reported: Reported) -> None:
            if reported.state == "trial" and failures:
                raise failures.pop()
            super().report(reported)

    stop = threading.Event()
    ports = DeafPorts()
    updater = Updater(
        device.settings, device.state_dir, NODE, ports, clock=device.clock, find_release=find_in_this_process
    )
    updater.resume()
    thread = threading.Thread(target=updater.run, args=(stop,))
    thread.start()
    try:
        updater.on_desired(device.simulator.order(release))
        wait_until(lambda: updater.reported().state == "committed")
    finally:
        stop.set()
        thread.join(timeout=10)
    assert updater.reported().state == "committed"


@pytest.mark.needs("root", "mount", "umount")
def test_nothing_is_done_that_cannot_be_written_down(device: Device, v1: Published, tmp_path: Path) -> None:
    v2 = publish(device, "2.0")
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", full], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        shutil.copytree(device.state_dir, full / "state", symlinks=True)
        device.state_dir = full / "state"
        device.boot()
        with (full / "log").open("wb", buffering=0) as log:
            os.posix_fallocate(log.fileno(), 0, os.statvfs(full).f_bavail * 4096)
        stop = threading.Event()
        thread = threading.Thread(target=device.updater.run, args=(stop,))
        thread.start()
        try:
            device.updater.on_desired(device.simulator.order(v2, rev=2))
            wait_until(lambda: device.error_code == "disk.full")
            assert (device.state, device.active_version) == ("committed", "1.0")
            (full / "log").unlink()
            wait_until(lambda: device.state == "committed" and device.active_version == "2.0")
        finally:
            stop.set()
            thread.join(timeout=10)
        assert device.error_code is None
    finally:
        subprocess.run(["umount", full], check=True)
