from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from edge_agent.errors import RefusedError
from edge_agent.health.doctor import (
    check_certificates,
    check_clock,
    check_disk,
    check_state_dir,
    checked,
)
from edge_agent.settings import MqttSettings, Settings, SpoolSettings

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)


def certificate(directory: Path, name: str, *, days: int) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - dt.timedelta(days=10))
        .not_valid_after(NOW + dt.timedelta(days=days))
        .sign(key, None)
    )
    assert isinstance(built.fingerprint(hashes.SHA256()), bytes)
    cert_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
    cert_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def test_a_writable_state_directory_passes_and_says_how_fast_it_is(tmp_path: Path) -> None:
    check = check_state_dir(Settings(state_dir=tmp_path))
    assert check.ok
    assert "fsync takes" in check.detail
    assert list(tmp_path.iterdir()) == []


def test_an_absent_state_directory_fails_with_its_code(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "absent")
    assert check_state_dir(settings).code == "disk.missing"
    assert check_disk(settings).code == "disk.missing"


def test_too_little_room_for_the_outbox_fails_with_numbers(tmp_path: Path) -> None:
    check = check_disk(Settings(state_dir=tmp_path, spool=SpoolSettings(outbox_max_bytes=1 << 60)))
    assert (check.ok, check.code) == (False, "disk.low")
    assert "MiB wanted" in check.detail
    assert check_disk(Settings(state_dir=tmp_path)).ok


def test_this_clock_is_set() -> None:
    assert check_clock().ok


def test_a_probe_that_raises_becomes_a_line_with_its_code() -> None:
    def refuse() -> str:
        raise RefusedError("broker.no", "it will not have us")

    def interrupt() -> str:
        raise PermissionError(13, "Permission denied")

    assert checked("x", refuse).code == "broker.no"
    assert checked("x", interrupt).code == "disk.permission"


def test_without_tls_there_is_nothing_to_check() -> None:
    assert check_certificates(MqttSettings()) == []


def test_a_valid_certificate_with_its_key_passes(tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "node", days=365)
    settings = MqttSettings(tls=True, ca_file=cert_file, cert_file=cert_file, key_file=key_file)
    checks = check_certificates(settings, now_s=NOW.timestamp())
    assert [c.ok for c in checks] == [True, True, True]


@pytest.mark.parametrize(("days", "is_ok", "word"), [(-1, False, "valid until"), (10, True, "expires soon")])
def test_an_expired_certificate_fails_and_one_that_soon_will_says_so(
    tmp_path: Path, days: int, *, is_ok: bool, word: str
) -> None:
    cert_file, _ = certificate(tmp_path, "ca", days=days)
    [check] = check_certificates(MqttSettings(tls=True, ca_file=cert_file), now_s=NOW.timestamp())
    assert check.ok is is_ok
    assert word in check.detail
    assert check.code == (None if is_ok else "tls.expired")


def test_a_key_of_another_certificate_a_missing_file_and_a_file_that_is_none_fail(tmp_path: Path) -> None:
    cert_file, _ = certificate(tmp_path, "node", days=10)
    _, other_key = certificate(tmp_path, "other", days=10)
    swapped = MqttSettings(tls=True, cert_file=cert_file, key_file=other_key)
    assert check_certificates(swapped, now_s=NOW.timestamp())[1].code == "tls.bad_key"
    missing = MqttSettings(tls=True, ca_file=tmp_path / "absent.pem")
    assert check_certificates(missing)[0].code == "disk.missing"
    (tmp_path / "noise.pem").write_text("this is no certificate")
    assert check_certificates(MqttSettings(tls=True, ca_file=tmp_path / "noise.pem"))[0].code == "tls.bad_certificate"
