"""A command in a process of its own: how long it takes and how much memory its whole tree holds at once."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_S = 0.05
_KIB = 1024
_TAIL_CHARS = 2000


@dataclass(frozen=True)
class Run:
    """What a command took.

    Args:
        seconds: wall time, interpreter start included.
        cpu_seconds: of the command and of all that it waited for.
        peak_rss_bytes: the larger of two readings: the most that any one process of the tree ever held (the kernel's
            own high-water mark) and the largest sum over the tree, seen every 50 ms. Pages that two processes share
            count twice in the sum.
        stdout: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    stdout: str


class CommandFailedError(Exception):
    """A command ended with another status than 0; the message holds the end of its stderr."""


def run_measured(command: Sequence[str | Path], *, cwd: Path, timeout_s: float = 1800.0) -> Run:
    """Run a command to its end.

    Args:
        command: program and arguments.
        cwd: working directory.
        timeout_s: after this long the whole tree is killed.

    Returns:
        Its figures.

    Raises:
        CommandFailedError: it failed or took too long.
    """
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started_s = time.monotonic()
        child = subprocess.Popen([str(part) for part in command], cwd=cwd, env=environment, stdout=out, stderr=err)
        largest_sum = 0
        # Not Popen.wait: only wait4 says what this one child has used.
        while (waited := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            largest_sum = max(largest_sum, _tree_rss_bytes(child.pid))
            if time.monotonic() - started_s > timeout_s:
                _kill_tree(child.pid)
            time.sleep(_SAMPLE_S)
        seconds = time.monotonic() - started_s
        child.returncode = os.waitstatus_to_exitcode(waited[1])
        usage = waited[2]
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            name = " ".join(str(part) for part in command[:4])
            raise CommandFailedError(f"{name} … ended with {child.returncode}: {err.read()[-_TAIL_CHARS:].strip()}")
        peak = max(largest_sum, usage.ru_maxrss * _KIB)
        return Run(seconds, usage.ru_utime + usage.ru_stime, peak, out.read())


def _tree_rss_bytes(pid: int) -> int:
    total = 0
    for process in _tree(pid):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _kill_tree(pid: int) -> None:
    for process in _tree(pid):
        try:
            process.kill()
        except psutil.Error:
            continue


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
