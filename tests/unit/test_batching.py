"""Events are answered together where that was seen to pay, and never where it would make a short queue wait."""

from __future__ import annotations

from edge_agent.batching import BatchSize

FAR_S = 100.0


def seen(**times_s: float) -> BatchSize:
    """What ``n`` events took together: ``seen(one=1.0, four=2.0)``."""
    sizes = BatchSize()
    for name, seconds in times_s.items():
        sizes.learn({"one": 1, "two": 2, "four": 4}[name], seconds)
    return sizes


def test_a_single_event_waits_for_nobody() -> None:
    assert seen(one=1.0, four=1.0).choose(1, 4, FAR_S) == 1


def test_nothing_is_put_together_before_one_event_was_timed() -> None:
    assert BatchSize().choose(4, 4, FAR_S) == 1


def test_as_many_as_wait_and_as_the_model_takes() -> None:
    sizes = seen(one=1.0)
    assert [sizes.choose(waiting, 4, FAR_S) for waiting in (2, 3, 4, 50)] == [2, 3, 4, 4]
    assert sizes.choose(50, 1, FAR_S) == 1


def test_together_ends_where_it_is_not_quicker() -> None:
    assert seen(one=1.0, four=3.0).choose(9, 4, FAR_S) == 4
    assert seen(one=1.0, four=3.9).choose(9, 4, FAR_S) == 1


def test_a_size_that_lost_is_tried_again_later() -> None:
    sizes = seen(one=1.0, four=4.0)
    for _ in range(199):
        sizes.learn(1, 1.0)
    assert sizes.choose(9, 4, FAR_S) == 1
    sizes.learn(1, 1.0)
    assert sizes.choose(9, 4, FAR_S) == 4


def test_the_deadline_bounds_how_many_are_taken() -> None:
    sizes = seen(one=0.1)
    assert [sizes.choose(9, 4, deadline_s) for deadline_s in (0.3, 0.9, 2.0)] == [1, 2, 4]


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    assert seen(one=0.0).choose(9, 4, 1.0) == 4
