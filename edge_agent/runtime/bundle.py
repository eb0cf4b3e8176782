"""From a directory on disk to bytes that may be loaded: who signed it, and is every file what was signed.

Nothing is handed to the tokenizer, the graph loader or the YAML parser before both questions are answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.contract.dsse import MANIFEST_TYPE, load_public_key, open_envelope
from edge_agent.contract.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Manifest,
    manifest_digest,
    parse_manifest,
    verify_files,
)
from edge_agent.errors import IntegrityError, PermanentError, from_os_error

PACKAGED_KEYS = Path(__file__).resolve().parent.parent / "keys"
MAX_SIGNATURE_BYTES = 4 << 20
MAX_KEY_BYTES = 64 << 10


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose manifest is trusted and whose files match it. Only this module makes them.

    Args:
        path: the bundle's directory.
        manifest: its parsed manifest.
        digest: hex SHA-256 of the manifest's bytes.
    """

    path: Path
    manifest: Manifest
    digest: str


def open_signed_bundle(path: Path, trusted_keys: Sequence[Ed25519PublicKey]) -> VerifiedBundle:
    """Open a bundle that carries its own signature, ``manifest.sig.json``.

    Args:
        path: the bundle's directory.
        trusted_keys: publishers' keys, of which any one suffices.

    Returns:
        The verified bundle.

    Raises:
        PermanentError: ``bundle.missing`` when there is no manifest.
        IntegrityError: ``bundle.unsigned``, ``signature.*``, ``bundle.manifest_mismatch``, ``bundle.manifest_invalid``,
            ``bundle.file_missing``, ``bundle.file_truncated`` or ``bundle.file_corrupt``.
        RefusedError: ``bundle.format_unsupported``.
    """
    manifest_bytes = _read(path / MANIFEST_NAME, "bundle.missing", MAX_SIGNATURE_BYTES)
    envelope = _read(path / SIGNATURE_NAME, "bundle.unsigned", MAX_SIGNATURE_BYTES)
    signed = open_envelope(envelope, MANIFEST_TYPE, trusted_keys)
    if signed != manifest_bytes:
        raise IntegrityError("bundle.manifest_mismatch", f"{MANIFEST_NAME} differs from what was signed")
    manifest = parse_manifest(signed)
    verify_files(path, manifest)
    return VerifiedBundle(path, manifest, manifest_digest(signed))


def open_installed_bundle(path: Path, expected_digest: str) -> VerifiedBundle:
    """Open a bundle whose digest was verified when it was installed; its files are hashed again.

    Args:
        path: the bundle's directory (a slot).
        expected_digest: hex SHA-256 that the manifest must have.

    Returns:
        The verified bundle.

    Raises:
        PermanentError: ``bundle.missing``.
        IntegrityError: ``bundle.digest_mismatch`` or a ``bundle.file_*`` code.
        RefusedError: ``bundle.format_unsupported``.
    """
    manifest_bytes = _read(path / MANIFEST_NAME, "bundle.missing", MAX_SIGNATURE_BYTES)
    digest = manifest_digest(manifest_bytes)
    if digest != expected_digest:
        raise IntegrityError(
            "bundle.digest_mismatch", f"manifest hashes to {digest[:12]}…, not {expected_digest[:12]}…", path=str(path)
        )
    manifest = parse_manifest(manifest_bytes)
    verify_files(path, manifest)
    return VerifiedBundle(path, manifest, digest)


def default_trust_places() -> tuple[Path, ...]:
    """Where publishers' keys are always looked for: in the package, then in the user's directory."""
    try:
        return (PACKAGED_KEYS, Path.home() / ".config" / "edge-agent" / "trusted")
    except RuntimeError:  # a user id without a home
        return (PACKAGED_KEYS,)


def load_trusted_keys(given: Iterable[Path] = (), *, places: Iterable[Path] | None = None) -> list[Ed25519PublicKey]:
    """Collect public keys.

    Args:
        given: further PEM files, or directories of them.
        places: directories of ``*.pem`` files that are read first; default: `default_trust_places`. An absent one
            holds no keys.

    Returns:
        The keys, in order of place and name.

    Raises:
        PermanentError: ``key.invalid`` naming the file, or ``disk.*`` when it cannot be read.
    """
    always = default_trust_places() if places is None else tuple(places)
    files = [file for place in always for file in sorted(place.glob("*.pem"))]
    for path in given:
        files.extend(sorted(path.glob("*.pem")) if path.is_dir() else [path])
    return [_load_key(file) for file in files]


def _load_key(file: Path) -> Ed25519PublicKey:
    try:
        with file.open("rb") as reader:
            pem = reader.read(MAX_KEY_BYTES)
    except OSError as error:
        raise from_os_error(error, f"reading key {file.name}") from error
    try:
        return load_public_key(pem)
    except PermanentError as error:
        raise PermanentError(error.code, f"{file}: {error.detail}", path=str(file)) from error


def _read(path: Path, missing_code: str, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as reader:
            content = reader.read(limit_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        kind = PermanentError if missing_code == "bundle.missing" else IntegrityError
        raise kind(missing_code, f"{path.name} is missing in {path.parent}", path=str(path)) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    if len(content) > limit_bytes:
        raise IntegrityError("bundle.manifest_invalid", f"{path.name} exceeds {limit_bytes} bytes", path=str(path))
    return content
