"""What the demo found out, and whether it keeps the product's promises."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deploy.demo.consumer import History
from deploy.demo.ledger import Totals
from edge_agent.contract.messages import UpdateState

# Release, the state it must end in, and the state in which that must have been decided.
EXPECTED: tuple[tuple[str, UpdateState, UpdateState], ...] = (
    ("v1", "committed", "probation"),
    ("v2", "committed", "probation"),
    ("v3", "failed", "trial"),
    ("v4", "rolled_back", "probation"),
)


@dataclass(frozen=True)
class UpdateOutcome:
    """How an ordered release ended.

    Args:
        release: v1 to v4.
        version: of the manifest.
        story: what the release is.
        new_bytes: what its publication added to the registry, and so what a node with the previous one downloads.
        state: the last one reported.
        decided_in: the state before the end: where it was decided.
        error: code of the reported error.
        detail: its sentence.
    """

    release: str
    version: str
    story: str
    new_bytes: int
    state: UpdateState | None
    decided_in: UpdateState | None
    error: str | None
    detail: str | None


@dataclass(frozen=True)
class Result:
    """Everything the closing table and the JSON file show.

    Args:
        totals: the ledger at the end.
        decisions_during_outage: decided by the node while the link was cut.
        delivered_after_outage: of these, received by the consumer once it was restored.
        outage_s: how long the link was cut.
        dead_letters: events that the node gave up on.
        dropped: events and messages that the node dropped by policy.
        recognised: events that the broker sent the node twice, and the node answered once.
        active_version: the model that serves at the end.
        updates: in the order of the orders.
        notes: whatever else went wrong (a wait that timed out, an exit status).
    """

    broker: str
    seconds: float
    totals: Totals
    decisions_during_outage: int
    delivered_after_outage: int
    outage_s: float
    dead_letters: int
    dropped: int
    recognised: int
    active_version: str | None
    updates: tuple[UpdateOutcome, ...]
    notes: tuple[str, ...] = ()

    def broken(self) -> list[str]:
        """Promises that were not kept; empty when the demo succeeded."""
        totals, cut_off, delivered = self.totals, self.decisions_during_outage, self.delivered_after_outage
        checks = [
            (totals.events_in > 0, "no event went in"),
            (totals.lost == 0, f"{totals.lost} events that the broker took were never answered"),
            (totals.duplicates == 0, f"{totals.duplicates} events were answered by more than one decision"),
            (self.dead_letters == 0, f"{self.dead_letters} valid events were given up on"),
            (self.dropped == 0, f"{self.dropped} messages were dropped by the node"),
            (self.decisions_during_outage > 0, "the node decided nothing while it was cut off"),
            (
                delivered == cut_off,
                f"of {cut_off} decisions made while cut off only {delivered} were delivered afterwards",
            ),
            (
                self.active_version == _version_of(self.updates, "v2"),
                f"{self.active_version} serves at the end, not v2",
            ),
        ]
        faults = [text for kept, text in checks if not kept]
        return [*faults, *totals.faults, *_update_faults(self.updates), *self.notes]

    def as_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {
            "ok": not self.broken(),
            "broken": self.broken(),
            "broker": self.broker,
            "seconds": round(self.seconds, 1),
            **asdict(self.totals),
            "decisions_during_outage": self.decisions_during_outage,
            "delivered_after_outage": self.delivered_after_outage,
            "outage_s": round(self.outage_s, 2),
            "dead_letters": self.dead_letters,
            "dropped": self.dropped,
            "recognised": self.recognised,
            "active_version": self.active_version,
            "updates": [asdict(u) for u in self.updates],
        }


def outcome_of(history: History) -> tuple[UpdateState | None, UpdateState | None, str | None, str | None]:
    """Last state, the state in which that was decided, and the error of one revision."""
    if history.last is None or not history.states:
        return None, None, None, None
    # Going back is the consequence of a decision, not the place where it was made.
    before = [s for s in history.states[:-1] if s != "rolling_back"]
    error = history.last.error
    return (
        history.states[-1],
        before[-1] if before else None,
        error.code if error else None,
        error.detail if error else None,
    )


def _version_of(updates: tuple[UpdateOutcome, ...], release: str) -> str | None:
    return next((u.version for u in updates if u.release == release), None)


def _update_faults(updates: tuple[UpdateOutcome, ...]) -> list[str]:
    faults = []
    found = {u.release: u for u in updates}
    for release, state, decided_in in EXPECTED:
        update = found.get(release)
        if update is None:
            faults.append(f"{release} was never ordered")
        elif (update.state, update.decided_in) != (state, decided_in):
            faults.append(
                f"{release} ended {update.state} after {update.decided_in} ({update.error}), "
                f"expected {state} after {decided_in}"
            )
    return faults
