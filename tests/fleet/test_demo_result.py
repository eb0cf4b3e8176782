from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.demo.consumer import History
from deploy.demo.ledger import Totals
from deploy.demo.result import EXPECTED, Result, UpdateOutcome, outcome_of
from edge_agent.contract.messages import ErrorInfo, Reported, UpdateState

TOTALS = Totals(10, 10, 0, 0, 0, (), 1.0, 2.0, 3.0, 4.0)
UPDATES = tuple(
    UpdateOutcome(release, f"1.{n}.0", "", 0, state, decided_in, None, None)
    for n, (release, state, decided_in) in enumerate(EXPECTED)
)
GOOD = Result("mosquitto", 40.0, TOTALS, 5, 5, 3.0, 0, 0, 0, "1.1.0", UPDATES)


def test_good_day_breaks_nothing() -> None:
    assert GOOD.broken() == []
    found = GOOD.as_dict()
    assert found["ok"]
    assert {"events_in", "decisions_out", "lost", "duplicates", "p50_ms", "p95_ms", "decisions_during_outage"} <= set(
        found
    )
    assert [(u["release"], u["state"]) for u in found["updates"]] == [(r, s) for r, s, _ in EXPECTED]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (replace(GOOD, totals=replace(TOTALS, lost=1)), "never answered"),
        (replace(GOOD, totals=replace(TOTALS, duplicates=1)), "more than one decision"),
        (replace(GOOD, totals=replace(TOTALS, events_in=0)), "no event went in"),
        (replace(GOOD, totals=replace(TOTALS, faults=("nonsense",))), "nonsense"),
        (replace(GOOD, decisions_during_outage=0, delivered_after_outage=0), "decided nothing"),
        (replace(GOOD, delivered_after_outage=4), "only 4 were delivered"),
        (replace(GOOD, dead_letters=1), "given up on"),
        (replace(GOOD, dropped=1), "dropped by the node"),
        (replace(GOOD, active_version="1.3.0"), "serves at the end, not v2"),
        (replace(GOOD, active_version=None), "serves at the end, not v2"),
        (replace(GOOD, notes=("edge-agent ended with status 1",)), "status 1"),
        (replace(GOOD, updates=UPDATES[:3]), "v4 was never ordered"),
    ],
)
def test_each_broken_promise_is_named(bad: Result, said: str) -> None:
    (fault,) = bad.broken()
    assert said in fault
    assert not bad.as_dict()["ok"]


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("state", ["idle", "downloading", "trial", "probation", None])
def test_update_that_did_not_end_as_told_is_named(position: int, state: UpdateState | None) -> None:
    updates = list(UPDATES)
    updates[position] = replace(updates[position], state=state)
    assert any(f"v{position + 1} ended {state}" in fault for fault in replace(GOOD, updates=tuple(updates)).broken())


def test_bad_model_refused_for_another_reason_than_its_trial_is_named() -> None:
    updates = (*UPDATES[:2], replace(UPDATES[2], decided_in="downloading"), UPDATES[3])
    assert "v3 ended failed after downloading" in replace(GOOD, updates=updates).broken()[0]


def test_outcome_names_the_state_that_decided() -> None:
    error = ErrorInfo(code="probation.worker_deaths", type="permanent", detail="2 deaths")
    last = Reported(rev=4, state="rolled_back", error=error, timestamp_ms=1)
    states: list[UpdateState] = ["downloading", "trial", "probation", "rolling_back", "rolled_back"]
    assert outcome_of(History(states, last)) == ("rolled_back", "probation", "probation.worker_deaths", "2 deaths")
    assert outcome_of(History()) == (None, None, None, None)
