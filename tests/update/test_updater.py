"""Orders on one device, with a real registry, HTTP, signatures and disk: which are followed, which are refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from edge_agent.contract.dsse import generate_key
from edge_agent.update.ports import ProbationCounts
from tests.fakes.release_simulator import Published
from tests.fakes.static_server import Fault, StaticServer
from tests.fakes.update_ports import GOOD_SERVICE
from tests.update.conftest import Device, publish

HAPPY_PATH = ["downloading", "verifying", "installing", "trial", "probation", "committed"]


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
