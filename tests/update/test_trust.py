"""Attacks on the registry's metadata, each with the code under which it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api import exceptions as tuf
from tuf.api.metadata import MetaFile, TargetFile

from edge_agent.contract.dsse import DESIRED_TYPE, MANIFEST_TYPE, generate_key, sign_envelope
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError, TransientError
from edge_agent.update.clock import BUILD_TIME, reference_time
from edge_agent.update.transport import open_transport
from edge_agent.update.trust import (
    TrustedRelease,
    find_release,
    map_tuf_error,
    open_desired,
    read_floor,
    trusted_now,
)
from edge_agent.update.trust_process import Request, find_release_in_child
from tests.fakes.release_simulator import Published, ReleaseSimulator, edit_json
from tests.fakes.static_server import Fault, StaticServer


class Client:
    """A device's view of the registry."""

    def __init__(self, directory: Path, simulator: ReleaseSimulator, url: str) -> None:
        self.state_dir = directory / "state"
        self.state_dir.mkdir()
        self.trust_dir = simulator.install_trust(directory / "trust")
        self.simulator = simulator
        self.url = url
        self.wall = simulator.now

    def find(self, path: str) -> TrustedRelease:
        transport = open_transport(self.url, timeout_s=5)
        return find_release(path, transport, trust_dir=self.trust_dir, state_dir=self.state_dir, wall=self.wall)

    def refusal(self, path: str) -> tuple[type[EdgeError], str]:
        with pytest.raises(EdgeError) as caught:
            self.find(path)
        return type(caught.value), caught.value.code


@pytest.fixture
def client(tmp_path: Path, simulator: ReleaseSimulator, server: StaticServer) -> Client:
    return Client(tmp_path, simulator, server.url)


@pytest.fixture
def release(simulator: ReleaseSimulator) -> Published:
    return simulator.publish("triage", "1.0.0", {})


def test_a_published_release_is_found_with_hash_and_size(client: Client, release: Published) -> None:
    found = client.find(release.path)
    assert (found.sha256, found.size) == (release.digest, len(release.manifest_bytes))
    assert found.url_path == f"targets/triage/1.0.0/cpu-x86_64/{release.digest}.manifest.json"


def test_a_release_that_was_never_published_is_unknown(client: Client, release: Published) -> None:
    assert client.refusal("triage/9.9.9/cpu-x86_64/manifest.json") == (PermanentError, "trust.unknown_release")


def test_rollback_to_yesterdays_metadata_is_refused(client: Client, release: Published) -> None:
    yesterday = client.simulator.metadata_state()
    newer = client.simulator.publish("triage", "1.0.1", {})
    client.find(newer.path)
    client.simulator.restore(yesterday)
    assert client.refusal(release.path) == (IntegrityError, "trust.rollback")


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_rollback_is_refused_also_when_a_power_cut_destroyed_the_cached_metadata(
    client: Client, release: Published, damage: bytes | None
) -> None:
    yesterday = client.simulator.metadata_state()
    newer = client.simulator.publish("triage", "1.0.1", {})
    client.find(newer.path)
    for cached in [path for path in (client.state_dir / "tuf").rglob("*.json") if not path.is_symlink()]:
        if damage is None:
            cached.unlink()
        else:
            cached.write_bytes(damage)
    client.simulator.restore(yesterday)
    assert client.refusal(release.path) == (IntegrityError, "trust.rollback")


def test_rollback_of_one_role_inside_a_new_timestamp_is_refused(client: Client, release: Published) -> None:
    client.simulator.publish("triage", "1.0.1", {})
    client.find(release.path)
    client.simulator.snapshot.version -= 1
    client.simulator.timestamp.version += 1
    client.simulator.save()
    assert client.refusal(release.path) == (IntegrityError, "trust.rollback")


def test_freeze_by_serving_the_same_metadata_forever_ends_with_its_expiry(client: Client, release: Published) -> None:
    client.find(release.path)
    client.wall += timedelta(days=1, minutes=1)
    assert client.refusal(release.path) == (TransientError, "trust.expired")


def test_freeze_with_the_clock_set_back_is_refused(client: Client, release: Published) -> None:
    client.simulator.timestamp.expires += timedelta(days=1)
    client.simulator.bump(client.simulator.timestamp)
    client.simulator.save()
    client.wall += timedelta(days=1, hours=23)
    client.find(release.path)
    client.simulator.timestamp.expires = client.simulator.now + timedelta(days=1)
    client.simulator.bump(client.simulator.timestamp)
    client.simulator.save()
    client.wall = client.simulator.now - timedelta(days=3)
    assert client.refusal(release.path) == (TransientError, "trust.expired")


def test_a_clock_at_the_epoch_does_not_revive_what_expired_before_this_agent_was_built() -> None:
    epoch = datetime.fromtimestamp(0, BUILD_TIME.tzinfo)
    assert reference_time(epoch, None) == BUILD_TIME
    assert reference_time(epoch, BUILD_TIME + timedelta(days=9)) == BUILD_TIME + timedelta(days=9)


def test_a_clock_set_far_ahead_blocks_for_now_and_is_not_remembered(client: Client, release: Published) -> None:
    client.wall += timedelta(days=3650)
    assert client.refusal(release.path) == (TransientError, "trust.expired")
    client.wall -= timedelta(days=3650)
    assert client.find(release.path).sha256 == release.digest
    assert trusted_now(client.state_dir, client.wall) == client.wall


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "releases"])
def test_metadata_signed_by_a_stranger_is_refused(client: Client, release: Published, role: str) -> None:
    client.simulator.signers[role] = CryptoSigner.generate_ed25519()
    client.simulator.bump(client.simulator.snapshot, client.simulator.timestamp, client.simulator.releases)
    client.simulator.targets.version += 1
    client.simulator.save()
    assert client.refusal(release.path) == (IntegrityError, "trust.signature")


def test_metadata_changed_after_signing_is_refused(client: Client, release: Published) -> None:
    edit_json(client.simulator.directory / "metadata" / "timestamp.json", version=99)
    assert client.refusal(release.path) == (IntegrityError, "trust.signature")


def test_mix_and_match_of_two_states_is_refused(client: Client, release: Published) -> None:
    metadata = client.simulator.directory / "metadata"
    old = (metadata / "2.releases.json").read_bytes()
    client.simulator.publish("triage", "1.0.1", {})
    (metadata / "3.releases.json").write_bytes(old)
    assert client.refusal(release.path) == (IntegrityError, "trust.hash_mismatch")


def test_a_release_named_by_the_wrong_role_is_unknown(client: Client, release: Published) -> None:
    # `releases` may only speak for */*/*/*: a target elsewhere does not exist, whoever signed it
    client.simulator.releases.targets["manifest.json"] = TargetFile.from_data("manifest.json", b"{}", ["sha256"])
    client.simulator.bump(client.simulator.releases, client.simulator.snapshot, client.simulator.timestamp)
    client.simulator.save()
    assert client.refusal("manifest.json") == (PermanentError, "trust.unknown_release")


def test_unknown_root_is_refused(client: Client, release: Published, tmp_path: Path) -> None:
    stranger = ReleaseSimulator(tmp_path / "other", now=client.simulator.now)
    stranger.install_trust(client.trust_dir)
    assert client.refusal(release.path) == (IntegrityError, "trust.signature")


def test_a_new_root_needs_the_threshold_of_the_old_one(client: Client, release: Published) -> None:
    client.simulator.root_signers = client.simulator.root_signers[:1]
    client.simulator.rotate_online_keys()
    assert client.refusal(release.path) == (IntegrityError, "trust.signature")


def test_a_missing_root_is_named(client: Client, release: Published) -> None:
    (client.trust_dir / "root.json").unlink()
    assert client.refusal(release.path) == (PermanentError, "trust.root_missing")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_root_that_is_no_root_is_named(client: Client, release: Published, content: bytes) -> None:
    (client.trust_dir / "root.json").write_bytes(content)
    assert client.refusal(release.path) == (PermanentError, "trust.root_invalid")


def test_keys_rotated_by_a_new_root_are_followed_and_lift_the_floor(client: Client, release: Published) -> None:
    client.simulator.timestamp.version = 1_000_000  # a fast-forward attack with stolen online keys
    client.simulator.save()
    client.find(release.path)
    client.simulator.rotate_online_keys()
    client.simulator.timestamp.version = 3
    client.simulator.save()
    assert client.find(release.path).sha256 == release.digest
    floor = read_floor(client.state_dir)
    assert floor is not None
    assert (floor.root, floor.timestamp) == (2, 3)


def test_endless_metadata_is_cut(client: Client, release: Published, server: StaticServer) -> None:
    server.fault("/metadata/timestamp.json", Fault(endless=True, always=True))
    assert client.refusal(release.path) == (IntegrityError, "trust.endless_data")
    assert server.sent_bytes["/metadata/timestamp.json"] < 64 << 20


@pytest.mark.parametrize("body", [b"", b"not json", b"{}", b'{"signed": {}}', b"[" * 10_000])
def test_metadata_that_is_none_is_refused(
    client: Client, release: Published, server: StaticServer, body: bytes
) -> None:
    server.fault("/metadata/timestamp.json", Fault(body=body, always=True))
    assert client.refusal(release.path) == (IntegrityError, "trust.metadata_invalid")


def test_a_manifest_larger_than_manifests_may_be_is_refused(client: Client, release: Published) -> None:
    client.simulator.releases.targets[release.path].length = 2 << 20
    client.simulator.bump(client.simulator.releases, client.simulator.snapshot, client.simulator.timestamp)
    client.simulator.save()
    assert client.refusal(release.path) == (IntegrityError, "trust.metadata_invalid")


def test_a_registry_that_is_down_is_transient(client: Client, release: Published) -> None:
    client.url = "http://127.0.0.1:1"
    assert client.refusal(release.path) == (TransientError, "trust.registry_unreachable")


def test_a_registry_in_trouble_is_transient(client: Client, release: Published, server: StaticServer) -> None:
    server.fault("/metadata/timestamp.json", Fault(status=503))
    assert client.refusal(release.path) == (TransientError, "trust.registry_unreachable")


def test_a_server_that_is_no_registry_is_named(client: Client, release: Published) -> None:
    client.url += "/elsewhere"
    assert client.refusal(release.path) == (PermanentError, "trust.registry_incomplete")


def test_a_redirect_is_refused(client: Client, release: Published, server: StaticServer) -> None:
    server.fault("/metadata/timestamp.json", Fault(status=302, location=server.url))
    assert client.refusal(release.path) == (PermanentError, "fetch.redirect_refused")


def test_a_registry_on_a_usb_stick_is_verified_the_same_way(client: Client, release: Published) -> None:
    client.url = client.simulator.directory.as_uri()
    assert client.find(release.path).sha256 == release.digest
    edit_json(client.simulator.directory / "metadata" / "timestamp.json", version=99)
    assert client.refusal(release.path) == (IntegrityError, "trust.signature")


LIBRARY_ERRORS: list[tuple[Exception, type[EdgeError], str]] = [
    (tuf.ExpiredMetadataError(), TransientError, "trust.expired"),
    (tuf.BadVersionNumberError(), IntegrityError, "trust.rollback"),
    (tuf.EqualVersionNumberError(), IntegrityError, "trust.rollback"),
    (tuf.UnsignedMetadataError(), IntegrityError, "trust.signature"),
    (tuf.LengthOrHashMismatchError(), IntegrityError, "trust.hash_mismatch"),
    (tuf.RepositoryError(), IntegrityError, "trust.metadata_invalid"),
    (tuf.DownloadError(), TransientError, "trust.registry_unreachable"),
    (tuf.SlowRetrievalError(), TransientError, "trust.registry_unreachable"),
    (tuf.DownloadLengthMismatchError(), IntegrityError, "trust.endless_data"),
    (tuf.DownloadHTTPError("no", 404), PermanentError, "trust.registry_incomplete"),
    (OSError(28, "No space left on device"), TransientError, "disk.full"),
    (ValueError("surprise"), IntegrityError, "trust.metadata_invalid"),
]


@pytest.mark.parametrize(("error", "kind", "code"), LIBRARY_ERRORS, ids=lambda value: type(value).__name__)
def test_library_error_is_mapped(error: Exception, kind: type[EdgeError], code: str) -> None:
    mapped = map_tuf_error(error)
    assert (type(mapped), mapped.code) == (kind, code)


def test_every_error_of_the_library_has_a_row() -> None:
    classes = {value for value in vars(tuf).values() if isinstance(value, type) and value.__module__ == tuf.__name__}
    assert classes <= {type(error) for error, _, _ in LIBRARY_ERRORS}


# -- the signed order ---------------------------------------------------------------------------------------------


@pytest.fixture
def trust_dir(simulator: ReleaseSimulator, tmp_path: Path) -> Path:
    return simulator.install_trust(tmp_path / "trust")


def refusal_of(call: Callable[[], object]) -> tuple[type[EdgeError], str]:
    with pytest.raises(EdgeError) as caught:
        call()
    return type(caught.value), caught.value.code


def test_a_signed_order_opens(simulator: ReleaseSimulator, release: Published, trust_dir: Path) -> None:
    assert open_desired(simulator.order(release, rev=3), trust_dir).rev == 3


def test_a_forged_order_is_refused(simulator: ReleaseSimulator, release: Published, trust_dir: Path) -> None:
    simulator.desired_key = generate_key()
    assert refusal_of(lambda: open_desired(simulator.order(release), trust_dir)) == (
        IntegrityError,
        "signature.untrusted",
    )


def test_a_second_trusted_key_allows_rotation(simulator: ReleaseSimulator, release: Published, trust_dir: Path) -> None:
    first = simulator.order(release)
    (trust_dir / "desired.pem").rename(trust_dir / "desired-old.pem")
    simulator.desired_key = generate_key()
    (trust_dir / "desired-new.pem").write_bytes(
        ReleaseSimulator.install_trust(simulator, trust_dir.parent / "new").joinpath("desired.pem").read_bytes()
    )
    assert open_desired(first, trust_dir).rev == 1
    assert open_desired(simulator.order(release, rev=2), trust_dir).rev == 2


def test_a_signed_manifest_is_no_order(simulator: ReleaseSimulator, release: Published, trust_dir: Path) -> None:
    envelope = sign_envelope(MANIFEST_TYPE, release.manifest_bytes, simulator.desired_key)
    assert refusal_of(lambda: open_desired(envelope, trust_dir)) == (IntegrityError, "signature.wrong_type")


def test_a_signed_payload_outside_the_contract_is_refused(simulator: ReleaseSimulator, trust_dir: Path) -> None:
    envelope = sign_envelope(DESIRED_TYPE, json.dumps({"schema_version": 2}).encode(), simulator.desired_key)
    assert refusal_of(lambda: open_desired(envelope, trust_dir)) == (RefusedError, "update.desired_invalid")


@pytest.mark.parametrize("envelope", [b"hello", b"{}", b"[]", b"\0", b"x" * (65 << 10)])
def test_bytes_that_are_no_envelope_are_refused(trust_dir: Path, envelope: bytes) -> None:
    assert refusal_of(lambda: open_desired(envelope, trust_dir)) == (IntegrityError, "signature.malformed")


def test_a_node_without_keys_says_so(simulator: ReleaseSimulator, release: Published, tmp_path: Path) -> None:
    assert refusal_of(lambda: open_desired(simulator.order(release), tmp_path / "none")) == (
        PermanentError,
        "trust.no_desired_key",
    )


# -- the child process --------------------------------------------------------------------------------------------


def request_of(client: Client, release: Published) -> Request:
    return Request(
        release=release.path,
        registry_url=client.url,
        trust_dir=client.trust_dir,
        state_dir=client.state_dir,
        wall=client.wall,
    )


def test_the_child_process_answers_as_the_function_does(client: Client, release: Published) -> None:
    found = find_release_in_child(request_of(client, release), lambda: None)
    assert found.sha256 == release.digest
    assert found == client.find(release.path)


def test_an_error_in_the_child_process_keeps_its_kind_and_code(client: Client, release: Published) -> None:
    edit_json(client.simulator.directory / "metadata" / "timestamp.json", version=99)
    refused = refusal_of(lambda: find_release_in_child(request_of(client, release), lambda: None))
    assert refused == (IntegrityError, "trust.signature")


def test_a_check_that_is_called_off_ends_its_child(client: Client, release: Published) -> None:
    class CalledOffError(Exception):
        pass

    def call_off() -> None:
        raise CalledOffError

    with pytest.raises(CalledOffError):
        find_release_in_child(request_of(client, release), call_off)


def test_the_agent_process_does_not_carry_the_trust_library() -> None:
    code = (
        "import sys, edge_agent.update.updater\n"
        "heavy = {'tuf', 'securesystemslib', 'urllib3', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_metafile_of_the_simulator_is_what_the_registry_layout_says(simulator: ReleaseSimulator) -> None:
    assert isinstance(simulator.snapshot.meta["releases.json"], MetaFile)
    assert simulator.snapshot.meta["releases.json"].hashes is not None
