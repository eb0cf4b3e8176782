"""The blob store: files by the hash of their content, ``blobs/sha256/aa/<hash>``.

A blob has its final name only after its bytes were fsynced and hashed, and is never written again. Slots link to
blobs, so what two bundles share is on disk once. Unfinished downloads lie in ``blobs/partial``.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from edge_agent.errors import IntegrityError, TransientError, from_os_error
from edge_agent.fs import copy_durable, make_dirs, move_durable, sha256_file

BLOB_MODE = 0o440


class BlobStore:
    """Blobs under the state directory.

    Args:
        state_dir: the agent's state directory.
    """

    def __init__(self, state_dir: Path) -> None:
        self._blobs = state_dir / "blobs" / "sha256"
        self._partial = state_dir / "blobs" / "partial"

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would lie."""
        return self._blobs / sha256[:2] / sha256

    def partial(self, sha256: str) -> Path:
        """Where the blob's unfinished download lies; the directory exists afterwards."""
        make_dirs(self._partial)
        return self._partial / f"{sha256}.part"

    def missing_bytes(self, sha256: str, size: int) -> int:
        """How many bytes of a blob are still to be fetched (a blob of the wrong size counts as absent)."""
        if self.has(sha256, size):
            return 0
        partial = self._partial / f"{sha256}.part"
        return size - min(size, partial.stat().st_size if partial.exists() else 0)

    def has(self, sha256: str, size: int) -> bool:
        """Whether a blob of this name and size is present. Its content is checked by `verify`, before installation."""
        path = self.path(sha256)
        return path.is_file() and path.stat().st_size == size

    def verify(self, sha256: str, size: int) -> None:
        """Hash a blob. A damaged one is removed, so that trying again fetches it anew.

        Raises:
            TransientError: ``blob.missing`` or ``blob.corrupt``.
        """
        path = self.path(sha256)
        if not self.has(sha256, size):
            path.unlink(missing_ok=True)
            raise TransientError("blob.missing", f"blob {sha256} is not complete in the store", sha256=sha256)
        if sha256_file(path) != sha256:
            path.unlink(missing_ok=True)
            raise TransientError("blob.corrupt", f"blob {sha256} was damaged on this disk; removed", sha256=sha256)

    def finish(self, sha256: str) -> None:
        """Give a complete, fsynced partial download its name.

        Raises:
            IntegrityError: ``fetch.blob_corrupt``; the partial file is then removed.
        """
        partial = self.partial(sha256)
        if sha256_file(partial) != sha256:
            partial.unlink(missing_ok=True)
            raise IntegrityError("fetch.blob_corrupt", f"downloaded bytes are not blob {sha256}", sha256=sha256)
        self._name(partial, sha256)

    def adopt(self, source: Path, sha256: str) -> None:
        """Copy a local file into the store.

        Raises:
            IntegrityError: ``fetch.blob_corrupt`` when it is not that content.
        """
        if not self.has(sha256, source.stat().st_size):
            copy_durable(source, self.partial(sha256))
            self.finish(sha256)

    def collect(self, keep: Collection[str]) -> int:
        """Remove blobs and partial downloads that nothing needs.

        Args:
            keep: hashes that stay.

        Returns:
            Bytes freed (a blob that a slot still links to frees nothing, which `os.stat` cannot foresee).
        """
        freed = 0
        try:
            for path in [*self._blobs.glob("??/*"), *self._partial.glob("*.part")]:
                if path.name.removesuffix(".part") not in keep:
                    freed += path.stat().st_size
                    path.unlink()
        except OSError as error:
            raise from_os_error(error, "removing unused blobs") from error
        return freed

    def _name(self, finished: Path, sha256: str) -> None:
        target = self.path(sha256)
        make_dirs(target.parent)
        try:
            os.chmod(finished, BLOB_MODE)  # noqa: PTH101 - symmetrical with os.link in slots
        except OSError as error:
            raise from_os_error(error, f"protecting {target.name}") from error
        move_durable(finished, target)
