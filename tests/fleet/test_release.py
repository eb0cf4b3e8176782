from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets

from deploy.keys import Keys, init_keys
from deploy.registry import Registry, save_public
from deploy.release import Published, find_release, list_releases, publish, stored_bytes
from edge_agent.contract.dsse import MANIFEST_TYPE, generate_key, sign_envelope
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError, TransientError
from tests.fleet.conftest import MakeBundle


def put(bundle: Path, registry: Registry, keys: Keys, *, sign: bool = False) -> Published:
    return publish(
        bundle,
        registry,
        publishers=keys.trusted_publishers(),
        sign_with=keys.private("publisher") if sign else None,
    )


def code_of(bundle: Path, registry: Registry, keys: Keys) -> str:
    with pytest.raises(EdgeError) as caught:
        put(bundle, registry, keys)
    assert list_releases(registry) == []
    return caught.value.code


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_published_release_is_listed_with_its_size(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    done = put(make_bundle(), registry, keys)
    (release,) = list_releases(registry)
    assert (release.path, release.digest) == ("triage/1.0.0/cpu-x86_64/manifest.json", done.digest)
    assert stored_bytes(registry, release) == done.size_bytes == done.new_bytes == 5015
    assert find_release(registry, "triage/1.0.0/cpu-x86_64") == release


def test_new_task_on_the_same_weights_moves_only_the_task(
    registry: Registry, keys: Keys, make_bundle: MakeBundle
) -> None:
    put(make_bundle("1.0.0"), registry, keys)
    done = put(make_bundle("1.1.0", task=b"name: triage\nversion: 2\n"), registry, keys)
    assert done.new_bytes == len(b"name: triage\nversion: 2\n")


def test_publishing_twice_changes_no_byte(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    put(bundle, registry, keys)
    before = files(registry.directory)
    again = put(bundle, registry, keys)
    assert (again.already, again.new_bytes) == (True, 0)
    assert files(registry.directory) == before


def test_same_version_with_other_bytes_is_refused(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    put(make_bundle("1.0.0"), registry, keys)
    before = files(registry.directory)
    with pytest.raises(RefusedError) as caught:
        put(make_bundle("1.0.0", weights=b"other"), registry, keys)
    assert caught.value.code == "release.exists"
    assert files(registry.directory) == before


def test_changed_weights_are_refused(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle / "model/decoder.onnx").write_bytes(b"w" + b"W" * 4999)
    assert code_of(bundle, registry, keys) == "bundle.file_corrupt"


def test_truncated_weights_are_refused(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle / "model/decoder.onnx").write_bytes(b"W" * 4999)
    assert code_of(bundle, registry, keys) == "bundle.file_truncated"


def test_missing_file_is_refused(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle / "tokenizer.json").unlink()
    assert code_of(bundle, registry, keys) == "bundle.file_missing"


def test_changed_manifest_is_refused_though_its_files_match(
    registry: Registry, keys: Keys, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle()
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["quality"] = {"accuracy": 1.0}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert code_of(bundle, registry, keys) == "signature.mismatch"


def test_unsigned_bundle_is_refused_until_signed_on_publication(
    registry: Registry, keys: Keys, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(sign=False)
    assert code_of(bundle, registry, keys) == "release.unsigned"
    put(bundle, registry, keys, sign=True)
    assert len(list_releases(registry)) == 1


def test_bundle_signed_by_a_stranger_is_refused(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(sign=False)
    raw = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.sig.json").write_bytes(sign_envelope(MANIFEST_TYPE, raw, generate_key()))
    assert code_of(bundle, registry, keys) == "signature.untrusted"


def test_directory_without_manifest_is_refused(registry: Registry, keys: Keys, tmp_path: Path) -> None:
    assert code_of(tmp_path, registry, keys) == "bundle.missing"


def test_reader_never_sees_half_a_release(tmp_path: Path, keys: Keys, make_bundle: MakeBundle) -> None:
    """Whatever write the power cut follows, a reader sees the old state whole, and publishing again completes it."""
    bundle = make_bundle("2.0.0", weights=b"new")

    class PowerCutError(Exception):
        pass

    def crash_after(writes: int) -> Registry:
        written: list[Path] = []

        def save(path: Path, content: bytes) -> None:
            if len(written) == writes:
                raise PowerCutError
            save_public(path, content)
            written.append(path)

        return Registry(tmp_path / f"registry-{writes}", keys, save=save)

    crashes = 0
    for writes in range(100):
        directory = tmp_path / f"registry-{writes}"
        whole = Registry(directory, keys)
        whole.init()
        put(make_bundle("1.0.0"), whole, keys)
        try:
            put(bundle, crash_after(writes), keys)
        except PowerCutError:
            crashes += 1
            assert [r.version for r in list_releases(whole)] == ["1.0.0"]
            put(bundle, whole, keys)
            assert [r.version for r in list_releases(whole)] == ["1.0.0", "2.0.0"]
        else:
            break
    # manifest, signature, releases, snapshot, timestamp
    assert crashes == 5


def test_every_listed_file_is_there_before_the_metadata_names_it(
    tmp_path: Path, keys: Keys, make_bundle: MakeBundle
) -> None:
    order: list[str] = []

    def save(path: Path, content: bytes) -> None:
        blobs = list((tmp_path / "r/blobs").rglob("[0-9a-f]" * 64))
        order.append(f"{path.name.split('.', 1)[-1]} with {len(blobs)} blobs")
        save_public(path, content)

    registry = Registry(tmp_path / "r", keys, save=save)
    registry.init()
    order.clear()
    put(make_bundle(), registry, keys)
    assert order == [
        "manifest.json with 3 blobs",
        "manifest.sig.json with 3 blobs",
        "releases.json with 3 blobs",
        "snapshot.json with 3 blobs",
        "json with 3 blobs",
    ]


def test_damaged_blob_is_repaired_by_publishing_again(registry: Registry, keys: Keys, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    put(bundle, registry, keys)
    before = files(registry.directory)
    blob = next(p for p in (registry.directory / "blobs").rglob("*") if p.is_file() and p.stat().st_size == 5000)
    blob.write_bytes(b"X" * 5000)
    assert put(bundle, registry, keys).new_bytes == 5000
    assert files(registry.directory) == before


def test_releases_replaced_by_a_hostile_server_are_not_signed_again(
    registry: Registry, keys: Keys, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    put(make_bundle(), registry, keys)
    stranger = Registry(tmp_path / "stranger", init_keys(tmp_path / "stranger-keys"))
    stranger.init()
    for name in ("timestamp.json", "1.snapshot.json", "2.snapshot.json", "2.releases.json"):
        source = stranger.metadata_dir / name
        if source.exists():
            (registry.metadata_dir / name).write_bytes(source.read_bytes())
    with pytest.raises(IntegrityError) as caught:
        registry.refresh()
    assert caught.value.code == "registry.tampered"


def test_release_added_behind_the_publishers_back_is_noticed(
    registry: Registry, keys: Keys, make_bundle: MakeBundle
) -> None:
    put(make_bundle(), registry, keys)
    path = registry.metadata_dir / "2.releases.json"
    releases = Metadata[Targets].from_bytes(path.read_bytes())
    releases.signed.targets["evil/1/cpu-x86_64/manifest.json"] = next(iter(releases.signed.targets.values()))
    path.write_bytes(releases.to_bytes())
    with pytest.raises(IntegrityError) as caught:
        put(make_bundle("1.1.0"), registry, keys)
    assert caught.value.code == "registry.tampered"


def test_second_publisher_waits_its_turn(registry: Registry) -> None:
    class Meanwhile:
        code = ""

    def save(path: Path, content: bytes) -> None:
        if not Meanwhile.code:
            with pytest.raises(TransientError) as caught:
                registry.refresh()
            Meanwhile.code = caught.value.code
        save_public(path, content)

    Registry(registry.directory, Keys(registry.directory.parent / "keys"), save=save).refresh()
    assert Meanwhile.code == "registry.busy"


def test_publication_without_the_offline_targets_key_works(
    registry: Registry, keys: Keys, make_bundle: MakeBundle
) -> None:
    for role in ("root1", "root2", "targets"):
        (keys.directory / "private" / f"{role}.pem").unlink()
    put(make_bundle(), registry, keys)
    registry.refresh()
    with pytest.raises(PermanentError) as caught:
        registry.refresh(offline_roles=True)
    assert caught.value.code == "key.missing"


def test_refresh_renews_an_expired_registry(tmp_path: Path, keys: Keys) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=200)
    Registry(tmp_path / "r", keys, now=lambda: long_ago).init()
    registry = Registry(tmp_path / "r", keys)
    assert registry.expiries()["targets"] < datetime.now(UTC)
    registry.refresh(offline_roles=True)
    assert min(registry.expiries().values()) > datetime.now(UTC) + timedelta(hours=23)


def test_second_init_does_not_wipe_a_registry(registry: Registry) -> None:
    with pytest.raises(RefusedError) as caught:
        registry.init()
    assert caught.value.code == "registry.exists"


def test_missing_registry_is_named(tmp_path: Path, keys: Keys) -> None:
    for attempt in (Registry(tmp_path / "nowhere", keys).refresh, Registry(tmp_path / "nowhere", keys).releases):
        with pytest.raises(PermanentError) as caught:
            attempt()
        assert caught.value.code == "registry.missing"
