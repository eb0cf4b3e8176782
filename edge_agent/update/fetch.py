"""Downloads that survive a power cut: fetch a file of known size and hash into the blob store.

Bytes go to ``blobs/partial/<hash>.part``, which is fsynced at every multiple of `Fetcher.sync_bytes` *before* a byte
beyond it is written. So whatever a power cut leaves, the file rounded down to such a multiple is as it was sent, and
the next process resumes there. The hash of the whole file decides at the end; nothing before it is trusted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from edge_agent.errors import IntegrityError, TransientError, from_os_error
from edge_agent.update.blobs import BlobStore
from edge_agent.update.clock import Clock
from edge_agent.update.transport import Stream, Transport

SYNC_BYTES = 4 << 20
_STALLED_ATTEMPTS = 5
_WAIT_MAX_S = 20.0
_SLICE_S = 1.0
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Wanted:
    """A file to fetch.

    Args:
        path: where the registry serves it, relative to the base URL.
        sha256: what it must hash to.
        size: its size in bytes; not one byte more is written.
    """

    path: str
    sha256: str
    size: int


def blob_url_path(sha256: str) -> str:
    """Where a registry serves a blob."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


class Fetcher:
    """Fetches into a blob store.

    Args:
        transport: where the bytes come from.
        store: where they go.
        clock: for pauses and the bandwidth cap.
        bandwidth_bytes_per_s: cap over each file; 0 = none.
        sync_bytes: distance of the points from which a download resumes.
    """

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        clock: Clock,
        *,
        bandwidth_bytes_per_s: int = 0,
        sync_bytes: int = SYNC_BYTES,
    ) -> None:
        self._transport = transport
        self._store = store
        self._clock = clock
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._sync_bytes = sync_bytes
        # Lengths that this process itself fsynced: inside one process a resume need not round down.
        self._synced: dict[str, int] = {}
        self._never = threading.Event()

    def fetch(self, wanted: Wanted, on_bytes: OnBytes) -> None:
        """Make sure that the file is in the store.

        Args:
            wanted: the file.
            on_bytes: called with the length so far, often; may raise to leave the download resumable.

        Raises:
            TransientError: ``fetch.unreachable``, ``fetch.interrupted``, ``fetch.truncated``, ``fetch.server_error``,
                ``disk.full`` after several attempts without progress.
            PermanentError: ``fetch.not_found`` and its like.
            IntegrityError: ``fetch.too_large``, ``fetch.size_mismatch``, ``fetch.blob_corrupt``.
        """
        if self._store.has(wanted.sha256, wanted.size):
            return
        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            stop=_StopWithoutProgress(_STALLED_ATTEMPTS, lambda: self._synced.get(wanted.sha256, 0)),
            wait=wait_random_exponential(multiplier=0.5, max=_WAIT_MAX_S),
            sleep=lambda pause_s: self._pause(pause_s, lambda: on_bytes(self._synced.get(wanted.sha256, 0))),
            reraise=True,
        )
        retrying(self._attempt, wanted, on_bytes)
        self._synced.pop(wanted.sha256, None)

    def _attempt(self, wanted: Wanted, on_bytes: OnBytes) -> None:
        offset = self._resume_at(wanted)
        resumed = offset > 0
        if offset < wanted.size or wanted.size == 0:
            try:
                with self._transport.open(wanted.path, offset=offset) as stream:
                    resumed = stream.start > 0
                    self._receive(wanted, stream, on_bytes)
            except TransientError as error:
                if error.code == "fetch.range_refused":
                    self._forget(wanted)
                raise
            except IntegrityError:
                self._forget(wanted)
                raise
        try:
            self._store.finish(wanted.sha256)
        except IntegrityError as error:
            self._forget(wanted)
            if resumed:
                # The beginning may stem from a disk that lied or from a file that was replaced meanwhile.
                raise TransientError(
                    "fetch.resume_mismatch", "resumed download does not match; from the start"
                ) from error
            raise

    def _resume_at(self, wanted: Wanted) -> int:
        partial = self._store.partial(wanted.sha256)
        length = partial.stat().st_size if partial.exists() else 0
        synced = self._synced.get(wanted.sha256)
        return length if synced == length and length <= wanted.size else self._durable(min(length, wanted.size))

    def _durable(self, length: int) -> int:
        return length - length % self._sync_bytes

    def _receive(self, wanted: Wanted, stream: Stream, on_bytes: OnBytes) -> None:
        if stream.size is not None and stream.size != wanted.size:
            detail = f"{wanted.path} has {stream.size} bytes at the registry, {wanted.size} are signed"
            raise IntegrityError("fetch.size_mismatch", detail, path=wanted.path)
        with _PartFile(self._store, wanted.sha256, stream.start, self._sync_bytes) as part:
            try:
                self._copy(wanted, stream, part, on_bytes)
            finally:
                part.sync()
                self._synced[wanted.sha256] = part.length
        if part.length < wanted.size:
            detail = f"{wanted.path}: connection ended at {part.length} of {wanted.size} bytes"
            raise TransientError("fetch.truncated", detail, path=wanted.path)

    def _copy(self, wanted: Wanted, stream: Stream, part: _PartFile, on_bytes: OnBytes) -> None:
        started_s = self._clock.monotonic_s()
        for chunk in stream.chunks:
            if part.length + len(chunk) > wanted.size:
                raise IntegrityError("fetch.too_large", f"{wanted.path} goes on past its {wanted.size} signed bytes")
            part.write(chunk)
            on_bytes(part.length)
            if self._bandwidth_bytes_per_s:
                due_s = started_s + (part.length - stream.start) / self._bandwidth_bytes_per_s
                self._pause(due_s - self._clock.monotonic_s(), lambda: on_bytes(part.length))

    def _pause(self, pause_s: float, between: Callable[[], None]) -> None:
        until_s = self._clock.monotonic_s() + pause_s
        while (left_s := until_s - self._clock.monotonic_s()) > 0:
            between()
            self._clock.wait(self._never, min(left_s, _SLICE_S))

    def _forget(self, wanted: Wanted) -> None:
        self._store.partial(wanted.sha256).unlink(missing_ok=True)
        self._synced.pop(wanted.sha256, None)


class _PartFile:
    """A partial download, cut back to where it can be trusted and fsynced before it grows past a sync point."""

    def __init__(self, store: BlobStore, sha256: str, start: int, sync_bytes: int) -> None:
        self.length = start
        self._sync_bytes = sync_bytes
        try:
            self._fd = os.open(store.partial(sha256), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)
        except OSError as error:
            raise from_os_error(error, "opening a partial download") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        try:
            while view:
                room = self._sync_bytes - self.length % self._sync_bytes
                written = os.write(self._fd, view[:room])
                self.length += written
                view = view[written:]
                if self.length % self._sync_bytes == 0:
                    os.fsync(self._fd)
        except OSError as error:
            raise from_os_error(error, "writing a download") from error

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise from_os_error(error, "writing a download") from error


class _StopWithoutProgress:
    """Give up after some attempts that brought no byte further than any before; a slow line is not a dead one.

    Args:
        attempts: attempts without progress that are allowed.
        length: the length reached so far, in bytes.
    """

    def __init__(self, attempts: int, length: Callable[[], int]) -> None:
        self._attempts = attempts
        self._length = length
        self._best = 0
        self._last_progress = 0

    def __call__(self, retry_state: RetryCallState) -> bool:
        if self._length() > self._best:
            self._best = self._length()
            self._last_progress = retry_state.attempt_number
        return retry_state.attempt_number - self._last_progress >= self._attempts
