"""An installed bundle: is every file still what was verified when it was installed?

Nothing is handed to the tokenizer, the graph loader or the YAML parser before that is answered. Who signed a bundle is
asked once, in `signed_bundle`; a worker starts from a digest, and needs no cryptography but a hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract.manifest import MANIFEST_NAME, Manifest, manifest_digest, parse_manifest, verify_files
from edge_agent.errors import IntegrityError, PermanentError, from_os_error

MAX_MANIFEST_BYTES = 4 << 20


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


def open_installed_bundle(path: Path, expected_digest: str, known: Mapping[str, str] | None = None) -> VerifiedBundle:
    """Open a bundle whose digest was verified when it was installed; its files are hashed again.

    Args:
        path: the bundle's directory (a slot).
        expected_digest: hex SHA-256 that the manifest must have.
        known: path to hex SHA-256 of files that were hashed a moment ago (`head_start`).

    Returns:
        The verified bundle.

    Raises:
        PermanentError: ``bundle.missing``.
        IntegrityError: ``bundle.digest_mismatch`` or a ``bundle.file_*`` code.
        RefusedError: ``bundle.format_unsupported``.
    """
    manifest_bytes = read_bounded(path / MANIFEST_NAME, "bundle.missing")
    digest = manifest_digest(manifest_bytes)
    if digest != expected_digest:
        raise IntegrityError(
            "bundle.digest_mismatch", f"manifest hashes to {digest[:12]}…, not {expected_digest[:12]}…", path=str(path)
        )
    return verify_contents(path, manifest_bytes, known)


def verify_contents(path: Path, manifest_bytes: bytes, known: Mapping[str, str] | None = None) -> VerifiedBundle:
    """Hold every file of a bundle against a manifest that is trusted already.

    Args:
        path: the bundle's directory.
        manifest_bytes: the manifest, whose signature or digest the caller has checked.
        known: path to hex SHA-256 of files that were hashed a moment ago.

    Raises:
        IntegrityError: ``bundle.manifest_invalid`` or a ``bundle.file_*`` code.
        RefusedError: ``bundle.format_unsupported``.
    """
    manifest = parse_manifest(manifest_bytes)
    verify_files(path, manifest, known)
    return VerifiedBundle(path, manifest, manifest_digest(manifest_bytes))


def read_bounded(path: Path, missing_code: str) -> bytes:
    """The bytes of a manifest or a signature.

    Args:
        path: the file; larger than `MAX_MANIFEST_BYTES` is refused.
        missing_code: code of the fault when it is not there.

    Raises:
        EdgeError: ``missing_code``, ``bundle.manifest_invalid`` when it is too large, ``disk.*``.
    """
    try:
        with path.open("rb") as reader:
            content = reader.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        kind = PermanentError if missing_code == "bundle.missing" else IntegrityError
        raise kind(missing_code, f"{path.name} is missing in {path.parent}", path=str(path)) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise IntegrityError(
            "bundle.manifest_invalid", f"{path.name} exceeds {MAX_MANIFEST_BYTES} bytes", path=str(path)
        )
    return content
