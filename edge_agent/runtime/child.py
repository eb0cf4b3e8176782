"""A child process whose every line of output is seen, and which lives in the care of one thread.

The kernel's parent-death signal follows the *thread* that started the child, not the process. So the thread that
reads the child's output also starts it, and stays until the child has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence

from edge_agent.errors import EdgeError, from_os_error

MAX_LINE_BYTES = 2000
KEPT_LINES = 20

OnLine = Callable[[str], None]


class ChildProcess:
    """Start a command.

    Args:
        command: program and arguments.
        env: the whole environment.
        pass_fd: file descriptor that the child inherits.
        on_line: gets every line of stdout and stderr (at most `MAX_LINE_BYTES` at a time), in the caring thread.

    Raises:
        EdgeError: as mapped by `from_os_error` when the program cannot be started.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], pass_fd: int, on_line: OnLine) -> None:
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._on_line = on_line
        self._process: subprocess.Popen[bytes] | None = None
        self._fault: EdgeError | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._care, args=(list(command), env, pass_fd), name="worker-output", daemon=True
        )
        self._thread.start()
        self._started.wait()
        if self._fault is not None:
            raise self._fault

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def kill(self) -> None:
        """End it at once (works on a stopped process too)."""
        if self._process is not None:
            self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended and its last line was seen; False when it still runs."""
        return self._ended.wait(timeout_s)

    def obituary(self) -> tuple[str, dict[str, int | str]]:
        """How it ended: a phrase for a person, and ``signal`` or ``exit_code`` for the error's context."""
        status = None if self._process is None else self._process.poll()
        if status is None:
            return "still running", {}
        if status < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-status).name
                return f"killed by {name}", {"signal": name}
            return f"killed by signal {-status}", {"signal": str(-status)}
        return f"exited with {status}", {"exit_code": status}

    def _care(self, command: list[str], env: dict[str, str], pass_fd: int) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                env=env,
                pass_fds=(pass_fd,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._fault = from_os_error(error, "starting the worker")
            self._ended.set()
            return
        finally:
            self._started.set()
        try:
            self._read_lines()
            self._process.wait()
        finally:
            self._ended.set()

    def _read_lines(self) -> None:
        if self._process is None or self._process.stdout is None:
            return
        with self._process.stdout as pipe:
            pending = b""
            while chunk := os.read(pipe.fileno(), MAX_LINE_BYTES):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._emit(line)
                if len(pending) >= MAX_LINE_BYTES:  # a line without an end is handed on in pieces
                    self._emit(pending)
                    pending = b""
            if pending:
                self._emit(pending)

    def _emit(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if not text:
            return
        self.last_lines.append(text)
        with contextlib.suppress(
            Exception
        ):  # a failing log must not stop the reading: the child would block on a full pipe
            self._on_line(text)
