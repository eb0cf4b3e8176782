"""Weights on large pages: a pass reads all of them, and on pages of 4 KB a tenth of it is spent looking pages up.

Asked for while the model loads, large pages would double the time to the first answer, because the kernel clears them
one by one. So a thread gathers the heap onto them once, after the first answer. Nothing but speed depends on it.

Source: madvise(2), MADV_COLLAPSE, Linux 6.1 and newer; mallopt(3). Where a system forbids large pages, or has none of
about 2 MB, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS = Path("/proc/self/maps")
_MADV_COLLAPSE = 25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_BLOCK_BYTES = 32 << 20
"""The most that glibc takes."""
_MAX_FAILURES = 3
"""In a row, after which the memory is taken to be too full or too scattered for more."""
_LARGEST_PAGE_BYTES = 4 << 20
"""Kernels with pages of 16 or 64 KB have large ones of 32 or 512 MB, of which much would stay empty."""


class LargePages:
    """Moves this process's heap once, in a thread of its own.

    Args:
        gather: does it.
    """

    def __init__(self, gather: Callable[[], object] | None = None) -> None:
        # At the process's own priority: a thread that stood back would take seconds beside busy ones, not a fraction.
        self._gather = gather or gather_heap
        self._is_begun = False

    def gather_once(self) -> None:
        """Begin, unless it was begun before."""
        if self._is_begun:
            return
        self._is_begun = True
        # No memory for a thread's stack: pages stay as they are.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._gather, name="large-pages", daemon=True).start()


def keep_on_heap() -> None:
    """Let the C library put everything on the heap from now on, where `gather_heap` finds it.

    By itself it maps blocks above some size apart, and raises that size when such a block is freed: where the weights
    lie would depend on what was freed before. And it gives every thread memory of its own, of which much stays empty.
    """
    # musl has no such call, and no heap that could be gathered.
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES)
        # What is free at the heap's end is kept as before: else every pass would give it back and ask for it again.
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_BLOCK_BYTES)


def gather_heap(settings: Path = SETTINGS, maps: Path = MAPS) -> int:
    """Move the heap, on which the C library keeps what the main thread loaded.

    Args:
        settings: the kernel's, of large pages.
        maps: the kernel's list of this process's memory.

    Returns:
        Bytes that lie on large pages now; 0 where the kernel has or allows none.
    """
    page_bytes = large_page_bytes(settings)
    heap = _heap(maps) if page_bytes else None
    if heap is None:
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    gathered = failures = 0
    # One at a time: a pass that runs meanwhile waits for one page, not for all.
    for at in range(-(-heap[0] // page_bytes) * page_bytes, heap[1] // page_bytes * page_bytes, page_bytes):
        if libc.madvise(at, page_bytes, _MADV_COLLAPSE) == 0:
            gathered, failures = gathered + page_bytes, 0
            continue
        failures += 1
        if failures == _MAX_FAILURES:  # every attempt has the kernel look for room, at others' cost
            break
    return gathered


def large_page_bytes(settings: Path = SETTINGS) -> int:
    """Size of a large page; 0 where the system forbids them or they are too large to be of use."""
    try:
        allowed = (settings / "enabled").read_text()
        size = int((settings / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return 0 if "[never]" in allowed or size > _LARGEST_PAGE_BYTES else size


def _heap(maps: Path) -> tuple[int, int] | None:
    """First address of the heap, which may lie in several parts side by side, and the first behind it."""
    try:
        lines = maps.read_bytes().splitlines()  # names of mapped files may be of any bytes
    except OSError:
        return None
    parts = [line.split(maxsplit=1)[0].partition(b"-") for line in lines if line.endswith(b"[heap]")]
    if not parts:
        return None
    return min(int(first, 16) for first, _, _ in parts), max(int(behind, 16) for _, _, behind in parts)
