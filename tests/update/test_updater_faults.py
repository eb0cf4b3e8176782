"""The network, the disk and the clock against an update; what is served stays."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

from edge_agent.contract.manifest import Resources, verify_files
from edge_agent.update.machine import RULES
from edge_agent.update.ports import TrialResult
from tests.fakes.release_simulator import Published
from tests.fakes.static_server import Fault, StaticServer
from tests.update.conftest import Device, publish


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
