"""Budget and fate, row by row; the power cut is a column: whatever was waited for, a start must know what to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.escalation import Destination, EscalationSpec
from edge_agent.contract.escalation_messages import Outcome
from edge_agent.escalation.rules import (
    MAX_POWER_CUTS,
    Budget,
    Moment,
    Verdict,
    Waiting,
    judge,
    left_ms,
    refilled,
    refusal,
    spent,
)

ASK, WAIT, ANEW, EXPIRE, CLOSE = Verdict.ASK, Verdict.WAIT, Verdict.WAIT_ANEW, Verdict.EXPIRE, Verdict.CLOSE
LAST = MAX_POWER_CUTS
HOUR_MS = 3_600_000


def spend(budget: Budget | None, per_hour: int, now: Moment) -> Budget | None:
    return spent(refilled(budget, per_hour, now))


ROWS: list[tuple[Destination, bool, int, int, Verdict, Verdict]] = [
    # to     open   waited ms  power cuts  what is done  after a power cut at that point
    ("http", True,  0,         0,          ASK,          ANEW),
    ("http", True,  29_999,    0,          ASK,          ANEW),
    ("http", True,  30_000,    0,          EXPIRE,       ANEW),
    ("http", True,  10**12,    0,          EXPIRE,       ANEW),
    ("http", True,  0,         LAST,       ASK,          EXPIRE),
    ("http", True,  30_000,    LAST,       EXPIRE,       EXPIRE),
    ("http", False, 0,         0,          CLOSE,        CLOSE),
    ("http", False, 30_000,    LAST,       CLOSE,        CLOSE),
    ("mqtt", True,  0,         0,          WAIT,         ANEW),
    ("mqtt", True,  29_999,    LAST,       WAIT,         EXPIRE),
    ("mqtt", True,  30_000,    1,          EXPIRE,       ANEW),
    ("mqtt", False, 0,         0,          CLOSE,        CLOSE),
]  # fmt: skip


@pytest.mark.parametrize(("to", "is_open", "waited_ms", "power_cuts", "verdict", "after_a_power_cut"), ROWS)
def test_the_fate_of_a_pending_escalation(
    *, to: Destination, is_open: bool, waited_ms: int, power_cuts: int, verdict: Verdict, after_a_power_cut: Verdict
) -> None:
    waiting = Waiting(1, to, Moment("boot-1", 5000), 30_000, power_cuts)
    assert judge(waiting, Moment("boot-1", 5000 + waited_ms), is_open=is_open) is verdict
    assert judge(waiting, Moment("boot-2", 0), is_open=is_open) is after_a_power_cut


def test_a_machine_that_loses_power_again_and_again_still_comes_to_an_end() -> None:
    waiting = Waiting(1, "http", Moment("boot-0", 0), 30_000, 0)
    for start in range(1, 100):
        verdict = judge(waiting, Moment(f"boot-{start}", 0), is_open=True)
        if verdict is EXPIRE:
            break
        waiting = Waiting(1, "http", Moment(f"boot-{start}", 0), 30_000, waiting.power_cuts + 1)
    assert waiting.power_cuts == MAX_POWER_CUTS


def test_the_time_left_is_the_whole_time_where_nobody_knows_how_long_the_power_was_off() -> None:
    waiting = Waiting(1, "http", Moment("boot-1", 5000), 30_000, 0)
    assert left_ms(waiting, Moment("boot-1", 15_000)) == 20_000
    assert left_ms(waiting, Moment("boot-2", 99)) == 30_000


SHARED = EscalationSpec(to="http", share=("text",))
UNSHARED = EscalationSpec(to="mqtt")


@pytest.mark.parametrize(
    ("spec", "is_open", "has_shared", "outcome"),
    [
        (SHARED, True, True, None),
        (SHARED, True, False, "nothing_to_share"),
        (SHARED, False, True, "not_configured"),
        (UNSHARED, True, False, None),
        (UNSHARED, False, False, "not_configured"),
    ],
)
def test_what_is_not_asked_at_all(
    *, spec: EscalationSpec, is_open: bool, has_shared: bool, outcome: Outcome | None
) -> None:
    assert refusal(spec, is_open=is_open, has_shared=has_shared) == outcome


def test_a_full_bucket_gives_an_hours_budget_at_once_and_then_one_every_part_of_an_hour() -> None:
    budget: Budget | None = None
    for _ in range(4):
        budget = spend(budget, 4, Moment("boot", 0))
        assert budget is not None
    assert spend(budget, 4, Moment("boot", HOUR_MS // 4 - 1)) is None
    assert spend(budget, 4, Moment("boot", HOUR_MS // 4)) is not None


def test_a_restart_of_the_daemon_or_the_machine_refills_nothing() -> None:
    spent = spend(None, 1, Moment("boot-1", 1000))
    assert spent is not None
    assert spend(spent, 1, Moment("boot-1", 2000)) is None
    assert spend(spent, 1, Moment("boot-2", 10 * HOUR_MS)) is None, "how long the power was off is not known"


def test_an_empty_bucket_refills_after_a_power_cut_from_the_first_look_on() -> None:
    empty = Budget(0.0, Moment("boot-1", 99))
    looked_at = refilled(empty, 1, Moment("boot-2", 0))
    assert spent(looked_at) is None
    assert spend(looked_at, 1, Moment("boot-2", HOUR_MS)) is not None


def test_a_budget_that_an_update_lowered_holds_at_once() -> None:
    assert spend(Budget(50.0, Moment("boot", 0)), 2, Moment("boot", 0)) == Budget(1.0, Moment("boot", 0))


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(0, 2 * HOUR_MS), st.booleans()), max_size=60),
)
def test_no_hour_sees_more_than_twice_the_budget_whatever_happens(per_hour: int, steps: list[tuple[int, bool]]) -> None:
    budget: Budget | None = None
    boot, at_ms, elapsed_ms = 0, 0, 0
    asked: list[int] = []
    for pause_ms, cuts_power in steps:
        elapsed_ms += pause_ms
        boot, at_ms = (boot + 1, 0) if cuts_power else (boot, at_ms + pause_ms)
        for _ in range(per_hour + 1):
            left = spend(budget, per_hour, Moment(str(boot), at_ms))
            if left is None:
                budget = refilled(budget, per_hour, Moment(str(boot), at_ms))
                break
            budget = left
            asked.append(elapsed_ms)
    for start in asked:
        assert sum(start <= at <= start + HOUR_MS for at in asked) <= 2 * per_hour + 1
