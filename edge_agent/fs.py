"""Durable file operations: what was acknowledged survives a power cut.

Every write that must survive goes: temporary file in the same directory, fsync of the file, rename, fsync of the
directory. Nothing else in the code base calls ``os.replace``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_agent.errors import TransientError, from_os_error

_HASH_BYTES = 4 << 20
"""Large, because whoever hashes beside other threads waits for the interpreter after each."""
_COPY_BYTES = 64 << 10
"""Small, because Linux caches what is written at once in one piece: who maps the file and looks up a row holds all of
that piece, up to 2 MB of it."""


def fsync_dir(path: Path) -> None:
    """Make the directory's own entries durable (a rename is not, until its directory is synced)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path, *, mode: int = 0o750) -> None:
    """Create a directory and its parents durably: a file in a directory that a power cut forgets is lost with it.

    Raises:
        EdgeError: as mapped by `from_os_error`.
    """
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        if not missing and not path.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        for directory in reversed(missing):
            directory.mkdir(mode=mode, exist_ok=True)
            fsync_dir(directory.parent)
    except OSError as error:
        raise from_os_error(error, f"creating {path}") from error


def write_atomic(path: Path, content: bytes, *, mode: int = 0o640) -> None:
    """Replace ``path`` by ``content``: readers see the old bytes or the new ones, also after a power cut.

    Args:
        path: the file to replace; its directory must exist.
        content: the whole new content.
        mode: permission bits of the new file, set before any byte is visible under ``path``.

    Raises:
        EdgeError: as mapped by `from_os_error`; ``path`` is then unchanged.
    """
    try:
        with _temporary(path) as (fd, temporary):
            os.fchmod(fd, mode)
            _write_all(fd, content)
            os.fsync(fd)
            temporary.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise from_os_error(error, f"writing {path.name}") from error


def copy_durable(source: Path, target: Path) -> None:
    """Copy bytes to a new file and fsync it (the caller syncs the directory once for many files)."""
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _COPY_BYTES)
            writer.flush()
            os.fsync(writer.fileno())
    except OSError as error:
        raise from_os_error(error, f"copying {source.name}") from error


def move_durable(temporary: Path, target: Path) -> None:
    """Give a finished, fsynced file its name: atomic for readers, durable when it returns.

    Args:
        temporary: a file (or directory) on the same file system, its content already fsynced.
        target: the name that readers look for; an existing file is replaced.
    """
    try:
        temporary.replace(target)
        fsync_dir(target.parent)
    except OSError as error:
        raise from_os_error(error, f"naming {target.name}") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as reader:
            buffer = memoryview(bytearray(_HASH_BYTES))
            while count := reader.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    return digest.hexdigest()


def require_space(directory: Path, needed_bytes: int, *, reserve_bytes: int = 0) -> None:
    """Refuse work that cannot fit, before its first byte.

    Raises:
        TransientError: ``disk.full`` with the numbers; space may come back.
    """
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes + reserve_bytes:
        raise TransientError(
            "disk.full",
            f"{needed_bytes} bytes needed and {reserve_bytes} kept free, but only {free_bytes} are available",
            needed_bytes=needed_bytes,
            reserve_bytes=reserve_bytes,
            free_bytes=free_bytes,
        )


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        yield fd, Path(name)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
