"""Which releases exist: the TUF metadata of the registry, verified by python-tuf's client.

Only `_refresh` imports tuf (some 10 MB of memory); the agent runs this module in a short-lived child process, see
`trust_process`. What python-tuf does not do, and is done here:

 * Its cache is renamed into place but not fsynced. A power cut may leave an empty ``timestamp.json``, which the client
   takes for "none yet", and with it the protection against rollback would be gone. So the versions that were verified
   last are kept in a durable file of our own (`Floor`), and metadata below them is refused.
 * Its reference time is the wall clock. Ours is `clock.reference_time`, so a clock set back revives nothing.

Source: TUF specification 1.0, section 5 (client workflow); 5.3.11 for the reset of the floor after a key rotation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from edge_agent.contract.dsse import DESIRED_TYPE, load_public_key, open_envelope
from edge_agent.contract.manifest import MAX_MANIFEST_BYTES
from edge_agent.contract.messages import DesiredState
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError, from_os_error
from edge_agent.fs import fsync_dir, make_dirs, write_atomic
from edge_agent.update.admission import parse_desired
from edge_agent.update.clock import reference_time
from edge_agent.update.transport import Transport

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient import Updater as TufUpdater
    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
    from tuf.ngclient.fetcher import FetcherInterface

ROOT_NAME = "root.json"
_FLOOR_NAME = "trust-floor.json"
_MAX_ENVELOPE_BYTES = 64 << 10


@dataclass(frozen=True)
class TrustedRelease:
    """What TUF says about a release's manifest.

    Args:
        path: TUF target path.
        sha256: hash of the manifest, which is the bundle's digest.
        size: its size in bytes.
        verified_at: reference time of this verification.
    """

    path: str
    sha256: str
    size: int
    verified_at: datetime

    @property
    def url_path(self) -> str:
        """Where the registry serves the manifest (TUF consistent snapshot: the hash prefixes the file's name)."""
        directory, _, name = self.path.rpartition("/")
        return f"targets/{directory}/{self.sha256}.{name}"


class Floor(BaseModel):
    """What was verified last; nothing older is believed.

    Args:
        verified_at: reference time of the last successful verification.
        root, timestamp, snapshot: metadata versions.
        online_keys: key ids of the timestamp and snapshot roles. When the root replaces them, the versions signed by
            the old keys no longer bind (recovery from a fast-forward attack).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    verified_at: datetime
    root: int
    timestamp: int
    snapshot: int
    online_keys: tuple[str, ...]


def read_floor(state_dir: Path) -> Floor | None:
    """The floor, None before the first verification or when the file cannot be used."""
    try:
        return Floor.model_validate(json.loads((state_dir / _FLOOR_NAME).read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None


def trusted_now(state_dir: Path, wall: datetime) -> datetime:
    """Reference time from the wall clock and what was verified before."""
    floor = read_floor(state_dir)
    return reference_time(wall, floor.verified_at if floor else None)


def load_desired_keys(trust_dir: Path) -> list[Ed25519PublicKey]:
    """The keys that may sign orders: ``desired*.pem``.

    Raises:
        PermanentError: ``trust.no_desired_key``, or ``key.invalid``.
    """
    paths = sorted(trust_dir.glob("desired*.pem"))
    if not paths:
        raise PermanentError("trust.no_desired_key", f"no desired*.pem in {trust_dir}", path=str(trust_dir))
    try:
        return [load_public_key(path.read_bytes()) for path in paths]
    except OSError as error:
        raise from_os_error(error, "reading the trusted keys") from error


def open_desired(envelope: bytes, trust_dir: Path) -> DesiredState:
    """Verify a desired envelope and parse the order in it.

    Raises:
        IntegrityError: ``signature.malformed``, ``signature.wrong_type``, ``signature.untrusted``.
        RefusedError: ``update.desired_invalid``.
        PermanentError: as `load_desired_keys`.
    """
    if len(envelope) > _MAX_ENVELOPE_BYTES:
        raise IntegrityError("signature.malformed", f"envelope exceeds {_MAX_ENVELOPE_BYTES} bytes")
    return parse_desired(open_envelope(envelope, DESIRED_TYPE, load_desired_keys(trust_dir)))


def find_release(
    path: str, transport: Transport, *, trust_dir: Path, state_dir: Path, wall: datetime
) -> TrustedRelease:
    """Refresh the metadata and look a release up.

    Args:
        path: TUF target path of its manifest.
        transport: the registry.
        trust_dir: holds ``root.json``, the first trusted root.
        state_dir: holds the metadata cache and the floor.
        wall: wall clock, UTC.

    Raises:
        TransientError: ``trust.registry_unreachable``; ``trust.expired`` (fresh metadata or a right clock cures it).
        IntegrityError: ``trust.rollback``, ``trust.signature``, ``trust.hash_mismatch``, ``trust.metadata_invalid``,
            ``trust.endless_data``.
        PermanentError: ``trust.root_missing``, ``trust.root_invalid``, ``trust.registry_incomplete``,
            ``trust.unknown_release``.
    """
    floor = read_floor(state_dir)
    now = reference_time(wall, floor.verified_at if floor else None)
    try:
        bootstrap = (trust_dir / ROOT_NAME).read_bytes()
    except OSError as error:
        raise PermanentError("trust.root_missing", f"no {ROOT_NAME} in {trust_dir}", path=str(trust_dir)) from error
    target = _refresh(path, transport, bootstrap, now=now, floor=floor, state_dir=state_dir)
    if target is None:
        raise PermanentError("trust.unknown_release", f"the registry knows no release {path}", path=path)
    sha256 = target.hashes.get("sha256")
    if sha256 is None or target.length > MAX_MANIFEST_BYTES:
        raise IntegrityError("trust.metadata_invalid", f"{path}: no sha256, or larger than a manifest may be")
    return TrustedRelease(path, sha256, target.length, now)


def _refresh(
    path: str, transport: Transport, bootstrap: bytes, *, now: datetime, floor: Floor | None, state_dir: Path
) -> TargetFile | None:
    from tuf.ngclient import Updater, UpdaterConfig

    # 16 kB of timestamp and 512 kB of root are the library's limits; a fleet's snapshot and releases are small too.
    cache = state_dir / "tuf"
    make_dirs(cache)
    limits = UpdaterConfig(max_root_rotations=64, max_delegations=4, snapshot_max_length=1 << 20)
    try:
        try:
            client = Updater(str(cache), "metadata/", fetcher=_fetcher(transport), config=limits, bootstrap=bootstrap)
        except Exception as error:
            mapped = map_tuf_error(error)
            if isinstance(mapped, IntegrityError):
                raise PermanentError("trust.root_invalid", f"{ROOT_NAME}: {mapped.detail}") from error
            raise
        trusted = _trusted_set(client)
        trusted.reference_time = now
        client.refresh()
        target = client.get_targetinfo(path)
    except EdgeError:
        raise
    except Exception as error:
        raise map_tuf_error(error) from error
    _raise_floor(trusted, floor, now, state_dir)
    return target


def _trusted_set(client: TufUpdater) -> TrustedMetadataSet:
    # The only private name of the library that we use; tests/update pins that it is there and takes effect.
    return client._trusted_set  # noqa: SLF001 - python-tuf offers no public view of what it trusts


def _raise_floor(trusted: TrustedMetadataSet, floor: Floor | None, now: datetime, state_dir: Path) -> None:
    root = trusted.root
    keys = tuple(sorted({*root.roles["timestamp"].keyids, *root.roles["snapshot"].keyids}))
    seen = Floor(
        verified_at=now,
        root=root.version,
        timestamp=trusted.timestamp.version,
        snapshot=trusted.snapshot.version,
        online_keys=keys,
    )
    if floor is not None:
        binding = ("root", "timestamp", "snapshot") if floor.online_keys == keys else ("root",)
        for role in binding:
            if getattr(seen, role) < getattr(floor, role):
                detail = f"{role} metadata is version {getattr(seen, role)}, {getattr(floor, role)} was seen before"
                raise IntegrityError("trust.rollback", detail, role=role)
    if floor is None or seen != floor:
        try:
            fsync_dir(state_dir / "tuf")
        except OSError as error:
            raise from_os_error(error, "saving the registry's metadata") from error
        write_atomic(state_dir / _FLOOR_NAME, seen.model_dump_json().encode())


def _fetcher(transport: Transport) -> FetcherInterface:
    from tuf.api.exceptions import DownloadError, DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class RegistryFetcher(FetcherInterface):
        """Our transport behind the library's seam; the library bounds the length."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                with transport.open(url) as stream:
                    yield from stream.chunks
            except PermanentError as error:
                # The library asks for root N+1 until it is told "not found".
                if error.code in {"fetch.not_found", "fetch.denied"}:
                    raise DownloadHTTPError(error.detail, 404) from error
                raise DownloadError(error.detail) from error
            except EdgeError as error:
                raise DownloadError(error.detail) from error

    return RegistryFetcher()


def map_tuf_error(error: Exception) -> EdgeError:
    """Any exception of python-tuf (or of what it uses) in our tree. Order: the most special first."""
    from tuf.api import exceptions as tuf

    detail = str(error) or type(error).__name__
    if isinstance(error, OSError):
        return from_os_error(error, "saving the registry's metadata")
    cause = error.__cause__
    if isinstance(error, tuf.DownloadError) and isinstance(cause, PermanentError) and cause.code != "fetch.not_found":
        return cause  # a refused redirect or an untrusted certificate stays what it is: time does not cure it
    for library_type, kind, code in (
        (tuf.ExpiredMetadataError, TransientError, "trust.expired"),
        (tuf.BadVersionNumberError, IntegrityError, "trust.rollback"),
        (tuf.UnsignedMetadataError, IntegrityError, "trust.signature"),
        (tuf.LengthOrHashMismatchError, IntegrityError, "trust.hash_mismatch"),
        (tuf.RepositoryError, IntegrityError, "trust.metadata_invalid"),
        (tuf.DownloadLengthMismatchError, IntegrityError, "trust.endless_data"),
        (tuf.DownloadHTTPError, PermanentError, "trust.registry_incomplete"),
        (tuf.DownloadError, TransientError, "trust.registry_unreachable"),
    ):
        if isinstance(error, library_type):
            return kind(code, detail)
    return IntegrityError("trust.metadata_invalid", f"{type(error).__name__}: {detail}")
