"""What we publish is read by python-tuf's own client, which shares no code with our writer's verification."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import ExpiredMetadataError, LengthOrHashMismatchError, RepositoryError
from tuf.ngclient import Updater

from deploy.keys import Keys, init_keys
from deploy.registry import Registry
from deploy.release import publish
from deploy.serve import RegistryServer
from edge_agent.contract.manifest import manifest_digest
from tests.fleet.conftest import MakeBundle

RELEASE = "triage/1.0.0/cpu-x86_64/manifest.json"


@pytest.fixture
def url(registry: Registry) -> Iterator[str]:
    with RegistryServer(registry.directory, quiet=True) as server:
        server.start()
        yield server.url
        server.shutdown()


def client(tmp_path: Path, url: str, keys: Keys, name: str = "device") -> Updater:
    metadata, targets = tmp_path / name / "metadata", tmp_path / name / "targets"
    metadata.mkdir(parents=True, exist_ok=True)
    targets.mkdir(exist_ok=True)
    return Updater(str(metadata), f"{url}/metadata/", str(targets), f"{url}/targets/", bootstrap=keys.root_bytes())


def test_fresh_device_finds_and_downloads_a_published_release(
    tmp_path: Path, url: str, keys: Keys, registry: Registry, make_bundle: MakeBundle
) -> None:
    done = publish(make_bundle(), registry, publishers=keys.trusted_publishers())
    updater = client(tmp_path, url, keys)
    updater.refresh()
    info = updater.get_targetinfo(RELEASE)
    assert info
    downloaded = Path(updater.download_target(info, str(tmp_path / "manifest.json")))
    assert manifest_digest(downloaded.read_bytes()) == done.digest
    assert updater.get_targetinfo("triage/1.0.0/cpu-x86_64/manifest.sig.json")
    assert updater.get_targetinfo("triage/2.0.0/cpu-x86_64/manifest.json") is None


def test_known_device_follows_later_publications(
    tmp_path: Path, url: str, keys: Keys, registry: Registry, make_bundle: MakeBundle
) -> None:
    client(tmp_path, url, keys).refresh()
    for version in ("1.0.0", "1.1.0"):
        publish(make_bundle(version), registry, publishers=keys.trusted_publishers())
        registry.refresh(offline_roles=True)
        updater = client(tmp_path, url, keys)
        updater.refresh()
        assert updater.get_targetinfo(f"triage/{version}/cpu-x86_64/manifest.json")


def test_device_with_another_root_trusts_nothing_here(tmp_path: Path, url: str) -> None:
    with pytest.raises(RepositoryError):
        client(tmp_path, url, init_keys(tmp_path / "other")).refresh()


def test_expired_timestamp_stops_a_device_until_refreshed(
    tmp_path: Path, url: str, keys: Keys, registry: Registry
) -> None:
    past = datetime.now(UTC) - timedelta(days=2)
    Registry(registry.directory, keys, now=lambda: past).refresh()
    with pytest.raises(ExpiredMetadataError):
        client(tmp_path, url, keys).refresh()
    registry.refresh()
    client(tmp_path, url, keys).refresh()


def test_replayed_older_timestamp_is_refused_by_a_device_that_saw_a_newer_one(
    tmp_path: Path, url: str, keys: Keys, registry: Registry
) -> None:
    timestamp = registry.metadata_dir / "timestamp.json"
    old = timestamp.read_bytes()
    registry.refresh()
    client(tmp_path, url, keys).refresh()
    timestamp.write_bytes(old)
    with pytest.raises(RepositoryError):
        client(tmp_path, url, keys).refresh()


def test_manifest_swapped_on_the_server_is_refused(
    tmp_path: Path, url: str, keys: Keys, registry: Registry, make_bundle: MakeBundle
) -> None:
    done = publish(make_bundle(), registry, publishers=keys.trusted_publishers())
    stored = registry.directory / "targets" / "triage/1.0.0/cpu-x86_64" / f"{done.digest}.manifest.json"
    stored.write_bytes(stored.read_bytes().replace(b"llama", b"lamal"))
    updater = client(tmp_path, url, keys)
    updater.refresh()
    info = updater.get_targetinfo(RELEASE)
    assert info
    with pytest.raises(LengthOrHashMismatchError):
        updater.download_target(info)
