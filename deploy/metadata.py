"""Reading and writing TUF metadata bytes: nothing is re-signed that was not first verified.

A publisher that loaded ``releases.json`` from the web server and signed it again without looking would lend its
signature to whatever a compromised server put there. So `open_chain` checks root > timestamp > snapshot > targets >
releases, by the same rules as a device except expiry (an expired registry must remain refreshable by its owner).

Source: TUF specification 1.0, sections 5.4 to 5.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from edge_agent.errors import IntegrityError, PermanentError, from_os_error

RELEASES = "releases"
_Role = TypeVar("_Role", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True)
class Chain:
    """The verified present state of a registry."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    releases: Metadata[Targets]


def sign(metadata: Metadata[_Role], *signers: Signer) -> bytes:
    """Replace all signatures by those of ``signers`` and return the bytes to publish."""
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def open_chain(metadata_dir: Path, root_bytes: bytes) -> Chain:
    """Load and verify the registry's current metadata.

    Args:
        metadata_dir: ``<registry>/metadata``.
        root_bytes: the trusted root, from the key directory and never from the registry.

    Raises:
        PermanentError: ``registry.missing`` when there is none.
        IntegrityError: ``registry.tampered`` when something is not signed as the root demands.
    """
    if not (metadata_dir / "timestamp.json").exists():
        raise PermanentError("registry.missing", f"no registry at {metadata_dir.parent}", path=str(metadata_dir))
    try:
        root = _parse(root_bytes, Root)
        root.verify_delegate("root", root)
        timestamp = _parse(_read(metadata_dir / "timestamp.json"), Timestamp)
        root.verify_delegate("timestamp", timestamp)
        snapshot = _parse(_listed(metadata_dir, "snapshot", timestamp.signed.snapshot_meta), Snapshot)
        root.verify_delegate("snapshot", snapshot)
        targets = _parse(_listed(metadata_dir, "targets", snapshot.signed.meta["targets.json"]), Targets)
        root.verify_delegate("targets", targets)
        releases = _parse(_listed(metadata_dir, RELEASES, snapshot.signed.meta[f"{RELEASES}.json"]), Targets)
        targets.verify_delegate(RELEASES, releases)
    except (RepositoryError, DeserializationError, ValueError, KeyError) as error:
        raise IntegrityError("registry.tampered", f"registry metadata does not verify: {error}") from error
    return Chain(root, timestamp, snapshot, targets, releases)


def _parse(raw: bytes, role: type[_Role]) -> Metadata[_Role]:
    metadata = Metadata[_Role].from_bytes(raw)
    if not isinstance(metadata.signed, role):
        raise ValueError(  # noqa: TRY004 - a wrong document, not a wrong call
            f"{metadata.signed.type} metadata where {role.type} was expected"
        )
    return metadata


def _listed(metadata_dir: Path, name: str, meta: MetaFile) -> bytes:
    raw = _read(metadata_dir / f"{meta.version}.{name}.json")
    meta.verify_length_and_hashes(raw)
    return raw


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
