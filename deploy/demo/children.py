"""Child processes of the demo: started with their stderr in a file, ended for certain."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edge_agent.errors import PermanentError, from_os_error

_TERMINATE_S = 10.0
TAIL_LINES = 25


class Child:
    """One process.

    Args:
        name: for messages and the log's file name.
        command: argument list.
        logs: directory for ``<name>.log`` (stdout and stderr together).

    Raises:
        EdgeError: when the program cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], logs: Path) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        try:
            with self.log.open("ab") as sink:
                # A session of its own, so that Ctrl-C reaches us alone and we decide the order of the end.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=_environment(),
                )
        except OSError as error:
            raise from_os_error(error, f"starting {name}") from error

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise when it has ended by itself.

        Raises:
            PermanentError: ``demo.child_ended`` with the tail of its log.
        """
        if not self.alive:
            raise PermanentError(
                "demo.child_ended", f"{self.name} ended with status {self._process.returncode}:\n{self.tail()}"
            )

    def stop(self, *, patience_s: float = _TERMINATE_S) -> int:
        """Ask it to end, then make it; its own children go with it. Returns the exit status."""
        if self.alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])


def _environment() -> dict[str, str]:
    """Ours, less what would change the node's settings, and with no proxy between it and this machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_AGENT_")}
    return {**own, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
