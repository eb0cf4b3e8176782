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
        peak_rss_bytes: the larger of two readings, taken every 50 ms: the kernel's own high-water mark of any one
            process of the tree, and the sum over the tree. Pages that two processes share count twice in the sum.
        stdout: what it printed.
        stderr: what it said.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    stdout: str
    stderr: str


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
        peak_rss_bytes = 0
        # Not Popen.wait: only wait4 says what this one child has used. Its ru_maxrss is of no use here: a child begins
        # with the mark of the process that it was forked from.
        while (waited := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            peak_rss_bytes = max(peak_rss_bytes, _tree_rss_bytes(child.pid))
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
        return Run(seconds, usage.ru_utime + usage.ru_stime, peak_rss_bytes, out.read(), err.read())


def _tree_rss_bytes(pid: int) -> int:
    readings = [_memory_kib(process.pid) for process in _tree(pid)]
    resident, marks = [now for now, _ in readings], [mark for _, mark in readings]
    return _KIB * max(sum(resident), *marks, 0)


def _memory_kib(pid: int) -> tuple[int, int]:
    """What a process holds now and has held at most; zeros when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    # A process that has ended but was not waited for has neither.
    return int(fields.get("VmRSS", "0").split()[0]), int(fields.get("VmHWM", "0").split()[0])


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
