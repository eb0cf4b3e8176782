"""What becomes of an escalation, as functions of what is known: no clock is read here, no disk, no network.

Rules:
- An event is asked about only where the site has opened that way, the task's budget has credit, and (over http) the
  event has at least one of the fields that may be shown.
- A wait ends ``timeout_ms`` after it began, on the machine's own clock since its start. No setting of the wall clock
  moves it. After a restart of the daemon it goes on; after a restart of the machine it begins anew, because nobody
  knows how long the power was off, but not for ever: the next start after `MAX_POWER_CUTS` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edge_agent.contract.escalation import Destination, EscalationSpec
from edge_agent.contract.escalation_messages import Outcome

MAX_POWER_CUTS = 3
_HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Moment:
    """A time on this machine.

    Args:
        boot_id: names the machine's start; times of two starts cannot be compared.
        at_ms: since that start, suspended time included.
    """

    boot_id: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Budget:
    """A token bucket: ``credit`` questions were left at ``since``."""

    credit: float
    since: Moment


def refilled(budget: Budget | None, per_hour: int, now: Moment) -> Budget:
    """The bucket at ``now``.

    Args:
        budget: what was left at an earlier moment; None before the first question, when the bucket is full.
        per_hour: its size, and its refill in an hour. Time without power, which nobody measured, refills nothing.
        now: the later moment.
    """
    if budget is None:
        return Budget(float(per_hour), now)
    is_one_start = budget.since.boot_id == now.boot_id
    elapsed_ms = max(0, now.at_ms - budget.since.at_ms) if is_one_start else 0
    return Budget(min(float(per_hour), budget.credit + elapsed_ms * per_hour / _HOUR_MS), now)


def spent(budget: Budget) -> Budget | None:
    """The bucket after one more question; None when it has no credit for it."""
    return Budget(budget.credit - 1.0, budget.since) if budget.credit >= 1.0 else None


def refusal(spec: EscalationSpec, *, is_open: bool, has_shared: bool) -> Outcome | None:
    """Why an event is not asked about at all; None when it may be.

    Args:
        spec: what the task says.
        is_open: whether the site's settings open that way.
        has_shared: whether the event has one of the fields that may be shown.
    """
    if not is_open:
        return "not_configured"
    # A person on the other side of MQTT can walk up to the machine; a model sees what is sent and nothing else.
    if spec.to == "http" and not has_shared:
        return "nothing_to_share"
    return None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A pending escalation, as far as its fate depends on it.

    Args:
        since: when its wait began, or began anew.
        timeout_ms: how long it may last.
        power_cuts: how often it began anew.
    """

    escalation_id: int
    to: Destination
    since: Moment
    timeout_ms: int
    power_cuts: int


class Verdict(Enum):
    """What to do about a pending escalation now."""

    ASK = "ask"
    WAIT = "wait"
    WAIT_ANEW = "wait anew"
    EXPIRE = "expire"
    CLOSE = "close"


def judge(waiting: Waiting, now: Moment, *, is_open: bool) -> Verdict:
    """The fate of a pending escalation.

    Returns:
        ASK over http as long as there is time; WAIT for an answer over mqtt, whose question is in the outbox; WAIT_ANEW
        at the first look after a restart of the machine; EXPIRE when its time is up; CLOSE when the site's settings no
        longer open that way.
    """
    if not is_open:
        return Verdict.CLOSE
    if waiting.since.boot_id != now.boot_id:
        return Verdict.WAIT_ANEW if waiting.power_cuts < MAX_POWER_CUTS else Verdict.EXPIRE
    if left_ms(waiting, now) <= 0:
        return Verdict.EXPIRE
    return Verdict.ASK if waiting.to == "http" else Verdict.WAIT


def left_ms(waiting: Waiting, now: Moment) -> int:
    """Time until the wait is over; the whole of it where it has yet to begin anew."""
    if waiting.since.boot_id != now.boot_id:
        return waiting.timeout_ms
    return waiting.since.at_ms + waiting.timeout_ms - now.at_ms
