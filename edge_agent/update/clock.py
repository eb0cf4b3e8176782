"""Time, as the updater needs it: a seam for tests, and a reference that a wrong clock cannot turn back."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Protocol

# Raised with every release of the agent. A gateway without a battery-backed clock boots in 1970 or at its image's
# date; nothing that was valid only before this moment can be meant for this agent.
BUILD_TIME = datetime(2026, 11, 1, tzinfo=UTC)


class Clock(Protocol):
    """Where the updater's time comes from."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def now(self) -> datetime:
        """Wall clock, UTC. May be wrong: see `reference_time`."""
        ...

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Sleep until ``event`` is set or the time is up; returns whether it is set."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def now(self) -> datetime:
        """See `Clock`."""
        return datetime.now(UTC)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """See `Clock`."""
        return event.wait(timeout_s)


def reference_time(wall: datetime, verified: datetime | None) -> datetime:
    """The moment against which expiry is judged: the latest that is known to have passed.

    A clock set back must not revive expired metadata (freeze) or an expired order. A clock set forward only blocks
    updates while it lasts: ``verified`` is recorded only when metadata was still valid at that moment, so a wrong
    future can never be remembered beyond an expiry date that the publisher signed.

    Args:
        wall: what the clock says.
        verified: reference time of the last successful verification, None when there was none.
    """
    return max(wall, BUILD_TIME, verified or BUILD_TIME)
