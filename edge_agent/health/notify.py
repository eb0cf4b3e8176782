"""Tells systemd how the daemon is, over the socket that it names. Does nothing where there is none.

Source: sd_notify(3), systemd.service(5) ``WatchdogSec=``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """sd_notify without libsystemd.

    Args:
        environment: normally ``os.environ``: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC``, ``WATCHDOG_PID``.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        values = os.environ if environment is None else environment
        name = values.get("NOTIFY_SOCKET", "")
        # "@name" is a socket in the abstract name space, which begins with a NUL byte.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._watchdog_s = _watchdog_s(values)
        self._fed_at = -1e9
        self._status = ""

    @property
    def is_enabled(self) -> bool:
        """Whether anyone listens."""
        return bool(self._address)

    @property
    def watchdog_interval_s(self) -> float | None:
        """How often to call `progress` at least (half of what systemd allows); None without a watchdog."""
        return None if self._watchdog_s is None else self._watchdog_s / 2

    def ready(self, status: str = "") -> bool:
        """The service is up (``Type=notify`` waits for this)."""
        return self._send({"READY": "1", "STATUS": status})

    def stopping(self, status: str = "") -> bool:
        """The service has begun to stop."""
        return self._send({"STOPPING": "1", "STATUS": status})

    def status(self, status: str) -> bool:
        """One line for ``systemctl status``; sent when it changes."""
        if status == self._status:
            return True
        self._status = status
        return self._send({"STATUS": status})

    def progress(self) -> bool:
        """Feed the watchdog. Call it after real work only, never from a timer; sends no more often than needed."""
        now = time.monotonic()
        if self._watchdog_s is None or now - self._fed_at < self._watchdog_s / 4:
            return False
        self._fed_at = now
        return self._send({"WATCHDOG": "1"})

    def allow(self, turn_s: float) -> bool:
        """Widen the watchdog where one turn of the loop may rightly last longer than it allows; never narrow it.

        Args:
            turn_s: the longest turn, between two calls of `progress`.
        """
        # The last message may be a quarter of the interval old when the turn begins.
        wanted_s = turn_s / 0.75
        if self._watchdog_s is None or wanted_s <= self._watchdog_s:
            return False
        self._watchdog_s = wanted_s
        return self._send({"WATCHDOG_USEC": str(round(wanted_s * 1e6))})

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for more time to start or to stop."""
        return self._send({"EXTEND_TIMEOUT_USEC": str(round(seconds * 1e6))})

    def _send(self, fields: Mapping[str, str]) -> bool:
        if not self._address:
            return False
        # A line break in a value would begin a new assignment.
        lines = [f"{name}={' '.join(value.split())}" for name, value in fields.items() if value]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # systemd's buffer may be full while the machine starts; a notification is never worth a stall.
                sock.settimeout(1.0)
                sock.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError:
            return False
        return True


def _watchdog_s(values: Mapping[str, str]) -> float | None:
    try:
        interval_s = int(values["WATCHDOG_USEC"]) / 1e6
        pid = int(values.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    # The variables are inherited by children, whose business the watchdog is not.
    return interval_s if interval_s > 0 and pid == os.getpid() else None
