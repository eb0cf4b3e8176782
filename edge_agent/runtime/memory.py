"""What the kernel says about this process's memory, and the ceiling that we set ourselves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

_KIB = 1024
_OOM_SCORE_MAX = 1000


def rss_bytes(pid: int | None = None) -> int | None:
    """Resident set of a process (default: this one) in bytes; None when it is gone."""
    try:
        # Cheap enough to be asked after every event; `status` formats forty lines.
        pages = Path(f"/proc/{'self' if pid is None else pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return None
    # A process that has ended and was not waited for yet has no pages.
    return int(pages) * os.sysconf("SC_PAGE_SIZE") or None


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far, in bytes."""
    return _status_bytes("VmHWM", None) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Hand what was freed back to the kernel, which the C library keeps by default for the next allocation.

    Worth its milliseconds after something that was built from far more than it is, such as a tokenizer.
    """
    # musl has no such call, and keeps less.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_growth(growth_bytes: int) -> None:
    """Allow this process's address space to grow by ``growth_bytes`` from now on, and no further.

    Address space, not resident memory: an allocation beyond it fails at once and can be named, instead of the
    kernel picking a victim later.
    """
    now = _status_bytes("VmSize", None)
    if now is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = now + growth_bytes
    if hard != resource.RLIM_INFINITY:
        ceiling = min(ceiling, hard)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))


def volunteer_for_oom_kill(extra: int) -> None:
    """Raise this process's OOM score above what it inherited: the agent must outlive its worker."""
    path = Path("/proc/self/oom_score_adj")
    # Raising needs no privilege; where /proc is restricted the kernel's own ranking has to do.
    with contextlib.suppress(OSError, ValueError):
        path.write_text(str(min(_OOM_SCORE_MAX, int(path.read_text()) + extra)))


def _status_bytes(field: str, pid: int | None) -> int | None:
    try:
        status = Path(f"/proc/{'self' if pid is None else pid}/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * _KIB
    return None
