"""Publishing a bundle: checked file by file, signed, copied once, visible all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deploy.registry import Registry
from edge_agent.contract.dsse import MANIFEST_TYPE, open_envelope, sign_envelope
from edge_agent.contract.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    manifest_digest,
    parse_manifest,
    read_manifest,
    verify_files,
)
from edge_agent.contract.messages import release_path
from edge_agent.errors import IntegrityError, RefusedError, from_os_error
from edge_agent.fs import require_space


@dataclass(frozen=True)
class Published:
    """What one publication did.

    Args:
        release: TUF target path, what `desired set --release` names.
        digest: hex SHA-256 of the manifest.
        size_bytes: all files of the bundle.
        new_bytes: of these, what the registry did not hold yet.
        already: the release was published before; nothing changed.
    """

    release: str
    digest: str
    size_bytes: int
    new_bytes: int
    already: bool


@dataclass(frozen=True)
class Release:
    """One published release.

    Args:
        path: TUF target path.
        digest: hex SHA-256 of its manifest.
        name, version, target: the levels of the path.
    """

    path: str
    digest: str
    name: str
    version: str
    target: str


def publish(
    bundle: Path,
    registry: Registry,
    *,
    publishers: Sequence[Ed25519PublicKey],
    sign_with: Ed25519PrivateKey | None = None,
) -> Published:
    """Publish a bundle directory; doing it twice changes nothing.

    Blobs come before the manifest and the manifest before the metadata, so that no reader ever learns of a file that
    is not there yet.

    Args:
        bundle: directory with ``manifest.json`` and, unless ``sign_with`` is given, ``manifest.sig.json``.
        registry: where to.
        publishers: keys of which one must have signed the manifest.
        sign_with: sign the manifest now; its public half must be among ``publishers``.

    Returns:
        What was published and how many bytes were new.

    Raises:
        IntegrityError: ``bundle.*`` when a file differs, ``signature.*`` when no trusted publisher signed it.
        RefusedError: ``release.exists`` when this name, version and target are taken by other bytes,
            ``release.unsigned`` when there is no signature.
        TransientError: ``disk.full``, ``registry.busy``.
    """
    manifest, digest = read_manifest(bundle)
    manifest_bytes = (bundle / MANIFEST_NAME).read_bytes()
    if manifest_digest(manifest_bytes) != digest:
        raise IntegrityError("bundle.manifest_invalid", "manifest changed while it was read")
    envelope = _read_signature(bundle) if sign_with is None else sign_envelope(MANIFEST_TYPE, manifest_bytes, sign_with)
    if open_envelope(envelope, MANIFEST_TYPE, publishers) != manifest_bytes:
        raise IntegrityError("signature.mismatch", "manifest.sig.json signs another manifest")
    verify_files(bundle, manifest)
    path = release_path(manifest.name, manifest.version, manifest.target)
    known = registry.releases()
    if path in known and known[path].hashes["sha256"] != digest:
        raise RefusedError(
            "release.exists", f"{path} is already published with other bytes; publish under a new version", path=path
        )
    new_bytes = _copy_blobs(bundle, {entry.sha256: (entry.path, entry.size) for entry in manifest.files}, registry)
    signature_path = str(PurePosixPath(path).with_name(SIGNATURE_NAME))
    if path in known and signature_path in known:
        # Any trusted signature serves; the first one stays, so that its path keeps meaning the same bytes.
        return Published(path, digest, manifest.size_bytes, new_bytes, already=True)
    added = registry.add_targets({path: manifest_bytes, signature_path: envelope})
    return Published(path, digest, manifest.size_bytes, new_bytes, already=not added)


def list_releases(registry: Registry) -> list[Release]:
    """Every release, by path (raises as `open_chain`)."""
    found = []
    for path, target in sorted(registry.releases().items()):
        at = PurePosixPath(path)
        if at.name == MANIFEST_NAME and len(at.parts) == 4:
            found.append(Release(path, target.hashes["sha256"], *at.parts[:3]))
    return found


def find_release(registry: Registry, path: str) -> Release:
    """The release at a TUF target path; the closing ``/manifest.json`` may be left out.

    Raises:
        RefusedError: ``release.unknown``.
    """
    full = path if path.endswith(f"/{MANIFEST_NAME}") else f"{path.rstrip('/')}/{MANIFEST_NAME}"
    for release in list_releases(registry):
        if release.path == full:
            return release
    raise RefusedError("release.unknown", f"{full} is not published here", path=full)


def stored_bytes(registry: Registry, release: Release) -> int:
    """Bytes of a published release's files, as its manifest lists them.

    Raises:
        IntegrityError: ``registry.tampered`` when the stored manifest is not the one that TUF lists.
    """
    at = PurePosixPath(release.path)
    stored = registry.directory / "targets" / at.parent / f"{release.digest}.{at.name}"
    try:
        raw = stored.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"reading the manifest of {release.path}") from error
    if manifest_digest(raw) != release.digest:
        raise IntegrityError("registry.tampered", f"stored manifest of {release.path} differs from its TUF hash")
    return parse_manifest(raw).size_bytes


def _read_signature(bundle: Path) -> bytes:
    path = bundle / SIGNATURE_NAME
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise RefusedError("release.unsigned", f"{path} is missing; sign with --sign", path=str(path)) from error
    except OSError as error:
        raise from_os_error(error, "reading the bundle's signature") from error


def _copy_blobs(bundle: Path, blobs: dict[str, tuple[str, int]], registry: Registry) -> int:
    # A blob that lies there damaged is copied again: publishing again is how a registry is repaired.
    missing = {sha256: found for sha256, found in blobs.items() if not registry.has_blob(sha256)}
    new_bytes = sum(size for _, size in missing.values())
    require_space(registry.directory, new_bytes)
    for sha256, (path, _) in missing.items():
        registry.add_blob(bundle / path, sha256)
    return new_bytes
