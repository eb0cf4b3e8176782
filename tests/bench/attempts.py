"""A part that cannot be made here (no compiler, a build that refuses) is said; the rest is measured all the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tests.bench.measured_run import CommandFailedError

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Missing:
    """Something that could not be made.

    Args:
        why: one line.
    """

    why: str


def attempt(make: Callable[[], T], say: Say) -> T | Missing:
    """What ``make`` returns, or why a command that it ran failed (which ``say`` is told)."""
    try:
        return make()
    except CommandFailedError as error:
        found = Missing(_last_line(str(error)))
    except subprocess.CalledProcessError as error:
        found = Missing(_last_line(str(error.stderr or error)))
    say(f"not measured: {found.why}")
    return found


def _last_line(text: str) -> str:
    # The last line of a program's complaint names the fault; what comes before is how it got there.
    return text.strip().rpartition("\n")[2]
