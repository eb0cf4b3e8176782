"""The update's rules, row by row; the power cut is a column: whatever was persisted, a start must know what to do."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from edge_agent.contract.messages import DesiredState, ErrorInfo
from edge_agent.update.machine import (
    BETWEEN,
    ENDS,
    RULES,
    Action,
    AlreadyActive,
    DeadlinePassed,
    Desired,
    Failed,
    Phase,
    Record,
    Refused,
    Resumed,
    Signal,
    Stopped,
    Succeeded,
    deadline_s,
    step,
)

OLD, NEW = "a" * 64, "b" * 64


def order(rev: int = 7, digest: str = OLD, **fields: Any) -> DesiredState:
    path = f"triage/{rev}.0.0/cpu-x86_64/manifest.json"
    not_after = datetime(2030, 1, 1, tzinfo=UTC)
    return DesiredState(node="n", rev=rev, release=path, digest=digest, not_after=not_after, **fields)


def record(phase: Phase, **fields: Any) -> Record:
    return Record(phase=phase, request=order(), rev_seen=7, digest_seen=OLD, **fields)


ERROR = ErrorInfo(code="x.y", type="transient", detail="z")
SUCCEEDED = Succeeded()
ALREADY = AlreadyActive()
RETRY = Failed(ERROR, retryable=True)
FAILED = Failed(ERROR, retryable=False)
LATE = DeadlinePassed()
NEWER = Desired(order(8, NEW))
AGAIN = Desired(order(8, OLD).model_copy(update={"release": order().release}))
REFUSED = Refused(order(8, NEW), ERROR)

DOWNLOAD, VERIFY, INSTALL, TRIAL = Action.DOWNLOAD, Action.VERIFY, Action.INSTALL, Action.TRIAL
PROBATION, COMMIT, BACK, WAIT = Action.PROBATION, Action.COMMIT, Action.ROLL_BACK, Action.WAIT

ROWS: list[tuple[Phase, Signal, Phase, tuple[Action, ...], tuple[Action, ...]]] = [
    # in            what happens  then            what is done      after a power cut at that point
    ("idle",         NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("idle",         REFUSED,     "failed",       (),               ()),
    ("idle",         LATE,        "idle",         (),               ()),
    ("downloading",  SUCCEEDED,   "verifying",    (VERIFY,),        (VERIFY,)),
    ("downloading",  ALREADY,     "committing",   (COMMIT,),        (COMMIT,)),
    ("downloading",  RETRY,       "downloading",  (WAIT, DOWNLOAD), (DOWNLOAD,)),
    ("downloading",  FAILED,      "failed",       (),               ()),
    ("downloading",  LATE,        "failed",       (),               ()),
    ("downloading",  NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("downloading",  AGAIN,       "downloading",  (),               (DOWNLOAD,)),
    ("downloading",  REFUSED,     "downloading",  (),               (DOWNLOAD,)),
    ("verifying",    SUCCEEDED,   "installing",   (INSTALL,),       (INSTALL,)),
    ("verifying",    RETRY,       "verifying",    (WAIT, VERIFY),   (VERIFY,)),
    ("verifying",    FAILED,      "failed",       (),               ()),
    ("verifying",    LATE,        "failed",       (),               ()),
    ("verifying",    NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("verifying",    ALREADY,     "verifying",    (),               (VERIFY,)),
    ("installing",   SUCCEEDED,   "trial",        (TRIAL,),         (TRIAL,)),
    ("installing",   RETRY,       "installing",   (WAIT, INSTALL),  (INSTALL,)),
    ("installing",   FAILED,      "failed",       (),               ()),
    ("installing",   LATE,        "failed",       (),               ()),
    ("installing",   NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("trial",        SUCCEEDED,   "probation",    (PROBATION,),     (PROBATION,)),
    ("trial",        RETRY,       "trial",        (WAIT, TRIAL),    (TRIAL,)),
    ("trial",        FAILED,      "failed",       (),               ()),
    ("trial",        LATE,        "failed",       (),               ()),
    ("trial",        NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("probation",    SUCCEEDED,   "committing",   (COMMIT,),        (COMMIT,)),
    ("probation",    RETRY,       "probation",    (WAIT, PROBATION), (PROBATION,)),
    ("probation",    FAILED,      "rolling_back", (BACK,),          (BACK,)),
    ("probation",    LATE,        "rolling_back", (BACK,),          (BACK,)),
    ("probation",    NEWER,       "rolling_back", (BACK,),          (BACK,)),
    ("probation",    AGAIN,       "probation",    (),               (PROBATION,)),
    ("committing",   SUCCEEDED,   "committed",    (),               ()),
    ("committing",   RETRY,       "committing",   (WAIT, COMMIT),   (COMMIT,)),
    ("committing",   FAILED,      "rolling_back", (BACK,),          (BACK,)),
    ("committing",   LATE,        "rolling_back", (BACK,),          (BACK,)),
    ("committing",   NEWER,       "committing",   (),               (COMMIT,)),
    ("rolling_back", SUCCEEDED,   "rolled_back",  (),               ()),
    ("rolling_back", RETRY,       "rolling_back", (WAIT, BACK),     (BACK,)),
    ("rolling_back", FAILED,      "failed",       (),               ()),
    ("rolling_back", LATE,        "failed",       (),               ()),
    ("rolling_back", NEWER,       "rolling_back", (),               (BACK,)),
    ("committed",    NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("committed",    REFUSED,     "failed",       (),               ()),
    ("committed",    SUCCEEDED,   "committed",    (),               ()),
    ("rolled_back",  NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("rolled_back",  FAILED,      "rolled_back",  (),               ()),
    ("failed",       NEWER,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("failed",       AGAIN,       "downloading",  (DOWNLOAD,),      (DOWNLOAD,)),
    ("failed",       LATE,        "failed",       (),               ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "signal", "then", "actions", "after_power_cut"),
    ROWS,
    ids=[f"{row[0]}-{type(row[1]).__name__}-{number}" for number, row in enumerate(ROWS)],
)
def test_row(
    phase: Phase, signal: Signal, then: Phase, actions: tuple[Action, ...], after_power_cut: tuple[Action, ...]
) -> None:
    after, done = step(record(phase), signal)
    assert (after.phase, done) == (then, actions)
    reloaded = Record.model_validate_json(after.model_dump_json())
    assert reloaded == after
    resumed, again = step(reloaded, Resumed())
    assert (resumed.phase, again) == (then, after_power_cut)


def test_the_table_has_a_row_for_every_way_out_of_every_working_state() -> None:
    for phase in RULES:
        signals = {type(row[1]) for row in ROWS if row[0] == phase}
        assert {Succeeded, Failed, DeadlinePassed, Desired} <= signals, phase


@pytest.mark.parametrize("phase", RULES)
def test_a_state_that_never_succeeds_ends_by_its_deadline(phase: Phase) -> None:
    current = record(phase)
    for _ in range(3):
        current, _ = step(current, DeadlinePassed())
    assert current.phase in ENDS


@pytest.mark.parametrize("phase", RULES)
def test_a_state_that_always_fails_transiently_runs_out_of_retries(phase: Phase) -> None:
    current, rule = record(phase), RULES[phase]
    for _ in range(rule.retries):
        current, actions = step(current, RETRY)
        assert current.phase == phase
        assert actions == (WAIT, rule.work)
    current, _ = step(current, RETRY)
    assert current.phase == rule.failed


@pytest.mark.parametrize("phase", RULES)
def test_a_state_that_takes_the_agent_down_each_time_is_left_by_the_loop_guard(phase: Phase) -> None:
    current, rule = record(phase), RULES[phase]
    for _ in range(rule.resumes):
        current, actions = step(current, Resumed())
        assert (current.phase, actions) == (phase, (rule.work,))
    current, _ = step(current, Resumed())
    assert current.phase == rule.failed
    assert current.error is not None
    assert "update.loop_guard" in current.error.code + current.error.detail
    assert (OLD in current.bad) is rule.blames


def test_a_restart_on_purpose_is_no_crash() -> None:
    current = record("probation")
    for _ in range(20):
        current, _ = step(current, Stopped())
        current, actions = step(current, Resumed())
        assert actions == (PROBATION,)
    assert current.resumes == 0


def test_a_newer_order_during_probation_leaves_the_candidate_without_blame_and_starts_from_the_old_bundle() -> None:
    leaving, _ = step(record("probation"), NEWER)
    assert leaving.waiting == NEWER.request
    started, actions = step(leaving, SUCCEEDED)
    assert (started.phase, actions, started.request) == ("downloading", (DOWNLOAD,), NEWER.request)
    assert started.bad == {}
    assert started.waiting is None


def test_a_newer_order_during_the_commit_waits_for_its_end() -> None:
    waiting, _ = step(record("committing"), NEWER)
    started, actions = step(waiting, SUCCEEDED)
    assert (started.phase, actions) == ("downloading", (DOWNLOAD,))
    assert started.committed == {"triage": "7.0.0"}


def test_the_newest_of_several_waiting_orders_wins() -> None:
    waiting, _ = step(record("rolling_back"), NEWER)
    waiting, _ = step(waiting, Desired(order(9, "c" * 64)))
    started, _ = step(waiting, SUCCEEDED)
    assert started.request is not None
    assert started.request.rev == 9


def test_a_rollback_that_fails_for_good_still_serves_a_waiting_order() -> None:
    waiting, _ = step(record("rolling_back"), NEWER)
    started, actions = step(waiting, FAILED)
    assert (started.phase, actions) == ("downloading", (DOWNLOAD,))


@pytest.mark.parametrize(("phase", "signal"), [("trial", FAILED), ("trial", LATE), ("probation", FAILED)])
def test_what_the_model_did_on_this_device_marks_it_bad(phase: Phase, signal: Signal) -> None:
    after, _ = step(record(phase), signal)
    assert after.bad == {OLD: 7}


@pytest.mark.parametrize(
    ("phase", "signal"), [("downloading", FAILED), ("verifying", FAILED), ("installing", LATE), ("probation", LATE)]
)
def test_registry_disk_and_too_few_events_say_nothing_against_the_model(phase: Phase, signal: Signal) -> None:
    after, _ = step(record(phase), signal)
    assert after.bad == {}


def test_a_commit_clears_the_mark_of_a_digest_that_was_tried_again() -> None:
    after, _ = step(record("committing", bad={OLD: 3, NEW: 4}), SUCCEEDED)
    assert after.bad == {NEW: 4}


def test_bad_marks_are_bounded_and_the_latest_are_kept() -> None:
    many = {f"{number:064x}": number for number in range(64)}
    after, _ = step(record("trial", bad=many), FAILED)
    assert len(after.bad) == 64
    assert OLD in after.bad
    assert f"{0:064x}" not in after.bad


def test_an_order_repeated_under_a_newer_revision_keeps_the_work_done_so_far() -> None:
    after, actions = step(record("trial", attempts=1), AGAIN)
    assert (after.phase, actions, after.attempts) == ("trial", (), 1)
    assert after.rev_seen == 8


def test_only_committing_leads_to_committed() -> None:
    assert [phase for phase, rule in RULES.items() if rule.passed == "committed"] == ["committing"]


def test_no_state_leads_back_to_idle() -> None:
    assert "idle" not in {row[2] for row in ROWS if row[0] != "idle"}


def test_the_committing_phase_is_probation_to_the_fleet() -> None:
    assert record("committing").state == "probation"


def test_a_long_probation_gets_time_to_find_its_events() -> None:
    month_s = 30 * 86_400.0
    assert deadline_s(Record(phase="probation", request=order(probation_s=month_s))) == 4 * month_s
    assert deadline_s(record("idle")) is None


def test_the_happy_path_visits_the_states_in_the_documented_order() -> None:
    current, _ = step(Record(), NEWER)
    visited = [current.phase]
    while current.phase not in ENDS:
        current, _ = step(current, SUCCEEDED)
        visited.append(current.phase)
    assert visited == ["downloading", "verifying", "installing", "trial", "probation", "committing", "committed"]
    assert all(one != other for one, other in pairwise(visited))
    assert set(visited) & BETWEEN == {"committing"}
