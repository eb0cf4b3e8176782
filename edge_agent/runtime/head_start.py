"""The hashes of an installed bundle's files, begun before anything else is imported: a start waits longest for them.

Imports nothing that takes long, and decides nothing: whether a hash is the right one is asked in `bundle`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_agent.errors import EdgeError
from edge_agent.fs import sha256_file

_MANIFEST_NAME = "manifest.json"
_MAX_THREADS = 4


class HeadStart:
    """Hashes what a bundle's manifest lists, in threads that begin at once and end with the block.

    Args:
        bundle: its directory.
        expected_digest: hex SHA-256 that the manifest must have; no other manifest is even parsed.
    """

    def __init__(self, bundle: Path, expected_digest: str) -> None:
        self._bundle = bundle
        self._hashes: dict[str, str] = {}
        self._left: deque[str] = deque()
        with contextlib.suppress(OSError):
            manifest_bytes = (bundle / _MANIFEST_NAME).read_bytes()
            if hashlib.sha256(manifest_bytes).hexdigest() == expected_digest:
                # The largest first, so that at the end none is left to a single thread.
                entries = sorted(json.loads(manifest_bytes)["files"], key=lambda entry: -int(entry["size"]))
                self._left.extend(entry["path"] for entry in entries)
        # The caller's own thread is one of them as soon as it has nothing else to do.
        self._threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))) - 1)
        self._pool = ThreadPoolExecutor(self._threads, "hash")

    def __enter__(self) -> Self:
        self._begun = [self._pool.submit(self._work) for _ in range(self._threads)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.clear()
        self._pool.shutdown()

    def hashes(self) -> dict[str, str]:
        """Hash what is left, and wait for the others.

        Returns:
            Path inside the bundle to hex SHA-256. What cannot be hashed is left out, for `open_installed_bundle` to
            name.
        """
        self._work()
        for thread in self._begun:
            thread.result()
        return self._hashes

    def _work(self) -> None:
        while True:
            try:
                path = self._left.popleft()
            except IndexError:
                return
            with contextlib.suppress(EdgeError):
                self._hashes[path] = sha256_file(self._bundle / path)
