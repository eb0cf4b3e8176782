"""The registry: a TUF repository on plain files, which any static web server or bucket can serve.

    metadata/timestamp.json  N.snapshot.json  N.targets.json  N.releases.json  N.root.json
    targets/<name>/<version>/<target>/<sha256>.manifest.json
    blobs/sha256/<first two hex>/<sha256>

`timestamp.json` is the only file that changes in place, and is written last: until that moment a reader sees the
previous state, whole. Leftovers of an interrupted publication are not referred to by anything and are overwritten by
the next one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from deploy.keys import Keys
from deploy.metadata import RELEASES, Chain, open_chain, sign
from edge_agent.errors import PermanentError, RefusedError, TransientError, from_os_error
from edge_agent.fs import copy_durable, make_dirs, move_durable, sha256_file, write_atomic

LIFETIMES = {
    "targets": timedelta(days=90),
    "releases": timedelta(days=90),
    "snapshot": timedelta(days=7),
    # Short, because it bounds how long a hostile mirror can hide a new release; `registry refresh` renews it.
    "timestamp": timedelta(days=1),
}
RELEASE_PATHS = "*/*/*/*"
PUBLIC_MODE = 0o644
_Role = TypeVar("_Role", Timestamp, Snapshot, Targets)
SaveFile = Callable[[Path, bytes], None]


def save_public(path: Path, content: bytes) -> None:
    """Write a file that the web server may read."""
    write_atomic(path, content, mode=PUBLIC_MODE)


class Registry:
    """One registry directory and the keys that speak for it.

    Args:
        directory: the served directory.
        keys: signs whatever is written; the trusted root comes from here.
        now: clock for expiry dates (UTC).
        save: writes one file atomically and durably; the seam where tests cut the power.
    """

    def __init__(
        self,
        directory: Path,
        keys: Keys,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        save: SaveFile = save_public,
    ) -> None:
        self.directory = directory
        self._keys = keys
        self._now = now
        self._save = save

    @property
    def metadata_dir(self) -> Path:
        """Where the TUF metadata lies."""
        return self.directory / "metadata"

    def init(self) -> None:
        """Create an empty registry.

        Raises:
            RefusedError: ``registry.exists`` when there is one.
            PermanentError: ``key.missing``.
        """
        if self.metadata_dir.exists() and any(self.metadata_dir.iterdir()):
            raise RefusedError("registry.exists", f"{self.directory} already holds a registry")
        signers = {role: self._keys.signer(role) for role in LIFETIMES}
        for name in ("metadata", "targets", "blobs/sha256"):
            make_dirs(self.directory / name, mode=0o755)
        delegation = DelegatedRole(RELEASES, [], threshold=1, terminating=True, paths=[RELEASE_PATHS])
        targets = Targets(delegations=Delegations(keys={}, roles={RELEASES: delegation}))
        targets.add_key(signers[RELEASES].public_key, RELEASES)
        self._save(self.metadata_dir / "1.root.json", self._keys.root_bytes())
        chain = Chain(
            root=Metadata[Root].from_bytes(self._keys.root_bytes()),
            timestamp=Metadata(Timestamp()),
            snapshot=Metadata(Snapshot()),
            targets=Metadata(targets),
            releases=Metadata(Targets()),
        )
        for part in (chain.timestamp, chain.snapshot, chain.targets, chain.releases):
            # A first version is made like every other: raised by one when it is signed.
            part.signed.version = 0
        self._write(chain, ("targets", RELEASES))

    def releases(self) -> Mapping[str, TargetFile]:
        """Every published target by path (raises as `open_chain`)."""
        return self._open().releases.signed.targets

    def expiries(self) -> dict[str, datetime]:
        """When each role's metadata stops being accepted by devices (UTC)."""
        chain = self._open()
        return {
            "root": chain.root.signed.expires,
            "targets": chain.targets.signed.expires,
            RELEASES: chain.releases.signed.expires,
            "snapshot": chain.snapshot.signed.expires,
            "timestamp": chain.timestamp.signed.expires,
        }

    def refresh(self, *, offline_roles: bool = False) -> None:
        """Sign snapshot and timestamp afresh, and with ``offline_roles`` targets and releases too."""
        with self._locked():
            self._write(self._open(), ("targets", RELEASES) if offline_roles else ())

    def add_targets(self, targets: Mapping[str, bytes]) -> bool:
        """Publish target files; all become visible at once.

        Args:
            targets: TUF target path -> content. Blobs that they refer to must be in place already.

        Returns:
            False when all of them were published before, byte for byte.

        Raises:
            RefusedError: ``release.exists`` when a path is taken by other bytes.
        """
        with self._locked():
            chain = self._open()
            known = chain.releases.signed.targets
            wanted = {path: TargetFile.from_data(path, raw, ["sha256"]) for path, raw in targets.items()}
            for path, target in wanted.items():
                if path in known and known[path].hashes != target.hashes:
                    raise RefusedError("release.exists", f"{path} is already published with other bytes", path=path)
            for path, target in wanted.items():
                at = PurePosixPath(path)
                folder = self.directory / "targets" / at.parent
                make_dirs(folder, mode=0o755)
                self._save(folder / f"{target.hashes['sha256']}.{at.name}", targets[path])
            if all(path in known for path in wanted):
                return False
            known.update(wanted)
            self._write(chain, (RELEASES,))
            return True

    def has_blob(self, sha256: str) -> bool:
        """Whether the blob is there, with the content that its name promises."""
        path = self.blob_path(sha256)
        return path.is_file() and sha256_file(path) == sha256

    def blob_path(self, sha256: str) -> Path:
        """Where a blob lives."""
        return self.directory / "blobs" / "sha256" / sha256[:2] / sha256

    def add_blob(self, source: Path, sha256: str) -> None:
        """Copy a file into the store under its hash; the copy is what gets hashed.

        Raises:
            TransientError: ``release.changed`` when the source is not what its manifest said, because it was
                rewritten while it was copied.
        """
        path = self.blob_path(sha256)
        make_dirs(path.parent, mode=0o755)
        temporary = path.with_name(f".{sha256}.{os.getpid()}.tmp")
        try:
            copy_durable(source, temporary)
            if sha256_file(temporary) != sha256:
                raise TransientError("release.changed", f"{source.name} changed while it was published")
            temporary.chmod(PUBLIC_MODE)
            move_durable(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self) -> Chain:
        return open_chain(self.metadata_dir, self._keys.root_bytes())

    def _write(self, chain: Chain, roles: tuple[str, ...]) -> None:
        snapshot, timestamp = chain.snapshot.signed, chain.timestamp.signed
        signers = {role: self._keys.signer(role) for role in (*roles, "snapshot", "timestamp")}
        for role in roles:
            part = chain.targets if role == "targets" else chain.releases
            raw = self._sign(part, role, signers)
            self._save(self.metadata_dir / f"{part.signed.version}.{role}.json", raw)
            snapshot.meta[f"{role}.json"] = MetaFile.from_data(part.signed.version, raw, ["sha256"])
        raw = self._sign(chain.snapshot, "snapshot", signers)
        self._save(self.metadata_dir / f"{snapshot.version}.snapshot.json", raw)
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, raw, ["sha256"])
        self._save(self.metadata_dir / "timestamp.json", self._sign(chain.timestamp, "timestamp", signers))

    def _sign(self, metadata: Metadata[_Role], role: str, signers: Mapping[str, CryptoSigner]) -> bytes:
        metadata.signed.version += 1
        metadata.signed.expires = (self._now() + LIFETIMES[role]).replace(microsecond=0)
        return sign(metadata, signers[role])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One publisher at a time: two would sign the same version number over different content."""
        try:
            fd = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError as error:
            raise PermanentError("registry.missing", f"no registry at {self.directory}") from error
        except OSError as error:
            raise from_os_error(error, "locking the registry") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TransientError("registry.busy", f"another publisher is writing to {self.directory}") from error
            yield
        finally:
            os.close(fd)
