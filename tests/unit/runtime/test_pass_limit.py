"""The flag that ends a pass: raised in time, for this event alone, and by a thread that does not stay."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_agent.runtime.pass_limit import PassLimit

FAR_S = 3600.0


def comes_true(condition: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + 20.0
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.001)
    return condition()


def watchers() -> int:
    return sum(thread.name == "pass-limit" for thread in threading.enumerate())


def test_the_flag_rises_at_the_deadline_and_falls_with_the_event() -> None:
    limit = PassLimit()
    with limit.until(time.monotonic() + 0.05):
        assert not limit.run_options.terminate
        assert comes_true(lambda: bool(limit.run_options.terminate))
    assert not limit.run_options.terminate


def test_a_deadline_nearer_than_that_of_the_event_before_is_not_slept_through() -> None:
    limit = PassLimit()
    with limit.until(time.monotonic() + FAR_S):
        pass
    with limit.until(time.monotonic() + 0.05):
        assert comes_true(lambda: bool(limit.run_options.terminate))


def test_the_deadline_of_an_event_that_was_answered_does_not_end_the_next_one() -> None:
    limit = PassLimit()
    before = watchers()
    with limit.until(time.monotonic() + 0.05):
        pass
    with limit.until(time.monotonic() + FAR_S):
        assert comes_true(lambda: limit.wakes_at_s is not None and limit.wakes_at_s > time.monotonic() + FAR_S / 2)
        assert not limit.run_options.terminate
    assert watchers() <= before + 1


def test_a_thousand_events_share_one_thread_and_idleness_has_none() -> None:
    limit = PassLimit()
    before = watchers()
    for _ in range(1000):
        with limit.until(time.monotonic() + 0.2):
            assert watchers() <= before + 1
    assert comes_true(lambda: watchers() <= before)
