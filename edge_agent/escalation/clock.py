"""Time that survives a restart of the daemon, and that no setting of the clock moves."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from edge_agent.escalation.rules import Moment

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class BootClock:
    """The kernel's clock since the machine's start (Linux: CLOCK_BOOTTIME, which counts suspended time as well)."""

    def __init__(self) -> None:
        try:
            self._boot_id = _BOOT_ID.read_text("ascii").strip()
        except OSError:
            # Then every restart of the daemon counts as one of the machine: waits begin anew.
            self._boot_id = uuid.uuid4().hex

    def now(self) -> Moment:
        """See `ports.Clock`."""
        return Moment(self._boot_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)
