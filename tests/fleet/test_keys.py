from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root

from deploy.keys import ALL_SIGNERS, Keys, init_keys
from edge_agent.errors import PermanentError, RefusedError


def test_no_other_user_can_read_a_private_key(keys: Keys) -> None:
    private = keys.directory / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {path.stem for path in private.iterdir()} == set(ALL_SIGNERS)
    assert {stat.S_IMODE(path.stat().st_mode) for path in private.iterdir()} == {0o600}


def test_trust_directory_holds_no_private_key(keys: Keys) -> None:
    assert {path.name for path in keys.trust_dir.iterdir()} == {"root.json", "desired.pem", "publisher.pem"}
    assert all(b"PRIVATE" not in path.read_bytes() for path in keys.trust_dir.iterdir())


def test_existing_keys_are_never_overwritten(keys: Keys) -> None:
    before = (keys.directory / "private" / "root1.pem").read_bytes()
    with pytest.raises(RefusedError) as caught:
        init_keys(keys.directory)
    assert caught.value.code == "keys.exist"
    assert (keys.directory / "private" / "root1.pem").read_bytes() == before


def test_interrupted_ceremony_leaves_no_directory_behind(tmp_path: Path) -> None:
    target = tmp_path / "file-in-the-way"
    target.write_text("x")
    with pytest.raises(RefusedError):
        init_keys(target)
    assert list(tmp_path.iterdir()) == [target]


def test_root_signed_by_one_key_of_two_is_refused(keys: Keys) -> None:
    root = Metadata[Root].from_bytes(keys.root_bytes())
    root.verify_delegate("root", root)
    root.signatures.pop(next(iter(root.signatures)))
    with pytest.raises(UnsignedMetadataError):
        root.verify_delegate("root", root)


def test_root_expires_after_a_year(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    root = Metadata[Root].from_bytes(init_keys(tmp_path / "k", now=now).root_bytes())
    assert root.signed.expires == now + timedelta(days=365)
    assert root.signed.consistent_snapshot


def test_missing_offline_key_is_named(keys: Keys) -> None:
    (keys.directory / "private" / "targets.pem").unlink()
    with pytest.raises(PermanentError) as caught:
        keys.signer("targets")
    assert caught.value.code == "key.missing"
    assert "targets" in caught.value.detail
