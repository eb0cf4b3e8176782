"""The heap on large pages: gathered where the kernel can, and nothing lost either way."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_agent.runtime.large_pages import LargePages, gather_heap, large_page_bytes

MB = 1 << 20
GROW = """
import hashlib
from edge_agent.runtime.large_pages import gather_heap, keep_on_heap

keep_on_heap()
blocks = [bytearray(bytes([number % 251]) * (1 << 20)) for number in range(64)]
before = [hashlib.sha256(block).hexdigest() for block in blocks]
gathered = gather_heap()
assert before == [hashlib.sha256(block).hexdigest() for block in blocks]
print(gathered)
"""


def has_collapse() -> bool:
    release = Path("/proc/sys/kernel/osrelease").read_text().split(".")
    return large_page_bytes() > 0 and (int(release[0]), int(release[1].split("-")[0])) >= (6, 1)


def test_heap_is_gathered_and_keeps_what_it_holds() -> None:
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    gathered = int(done.stdout)
    if has_collapse():
        assert gathered > 32 * MB
    else:
        assert gathered >= 0


ONE_HEAP = """
import ctypes, threading
from edge_agent.runtime.large_pages import keep_on_heap

keep_on_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
found = [libc.malloc(16 << 20)]
thread = threading.Thread(target=lambda: found.append(libc.malloc(16 << 20)))
thread.start()
thread.join()
parts = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.endswith("[heap]\\n")]
print(all(any(int(a, 16) <= at < int(b, 16) for a, b in parts) for at in found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no heap that could be kept together")
def test_large_blocks_of_every_thread_lie_on_the_heap() -> None:
    result = subprocess.run([sys.executable, "-c", ONE_HEAP], check=True, capture_output=True, text=True)
    assert result.stdout == "True\n"


@pytest.mark.parametrize(
    ("enabled", "size"),
    [("always madvise [never]", "2097152"), ("always [madvise] never", "33554432"), ("[always] madvise never", "huh")],
    ids=["forbidden", "32-mb-pages", "unreadable-size"],
)
def test_system_without_fitting_large_pages_is_left_alone(enabled: str, size: str, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "hpage_pmd_size").write_text(size)
    assert gather_heap(settings=tmp_path) == 0


def test_kernel_without_large_pages_is_left_alone(tmp_path: Path) -> None:
    assert gather_heap(settings=tmp_path / "absent") == 0


def test_process_without_a_heap_of_its_own_is_left_alone(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/python3\n")
    assert gather_heap(maps=maps) == 0


def test_it_happens_once() -> None:
    calls: list[int] = []
    done = threading.Event()

    def gather() -> None:
        calls.append(1)
        done.set()

    pages = LargePages(gather)
    for _ in range(3):
        pages.gather_once()
        assert done.wait(5)
    for thread in threading.enumerate():
        if thread.name == "large-pages":
            thread.join(5)
    assert calls == [1]


def test_heap_in_several_parts_is_taken_as_a_whole(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    # The kernel's own addresses, which no process has: every attempt fails, and the third is the last.
    maps.write_bytes(
        b"ffff800000000000-ffff800000200000 rw-p 0 00:00 0 [heap]\n"
        b"ffff800000200000-ffff800010000000 rw-p 0 00:00 0 [heap]\n\xff\n"
    )
    assert gather_heap(maps=maps) == 0
