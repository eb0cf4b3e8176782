"""Events that wait for an answer from elsewhere: the room of the spool between inbox and outbox.

Rules:
- ``begin`` moves an event here from the inbox in one transaction; ``settle`` turns it into exactly one message of the
  outbox in another (``give_up`` is both at once). So after a power cut an event waits in the inbox, waits here, or is
  answered: exactly one of them.
- Whoever settles first wins: the answer, the timeout, or a fallback. For everyone after that the escalation is unknown.
- An event that waits here is a duplicate to the inbox, however many answers came since.
"""

from __future__ import annotations

import collections
import sqlite3
import threading
from collections.abc import Iterable
from enum import Enum

from edge_agent.contract.escalation_messages import Outcome
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import BudgetRow, EscalationCase, EscalationRow, NewEscalation, OutboundMessage
from edge_agent.uplink.spool_rows import add_count, as_text, enqueue, inbox_row, remember, total
from edge_agent.uplink.spool_store import SpoolStore

# Counters that are no drops: `QueueTelemetry.escalations` shows them under the outcome's own name.
OUTCOME_PREFIX = "outcome/"
_ROW = "id, destination, boot_id, begun_ms, timeout_ms, power_cuts, attempts"


class Begun(Enum):
    """What became of an event that was to be escalated."""

    BEGUN = "begun"
    FULL = "full"
    GONE = "gone"


class EscalationQueue:
    """The pending escalations of a spool. All methods may be called from any thread.

    Args:
        store: the spool's file.
        settings: bounds of what the others keep.
        leased: inbox ids that somebody works on; an event that moves here is no longer among them.
        outbox_changed: set whenever a message was queued.
    """

    def __init__(
        self, store: SpoolStore, settings: SpoolSettings, leased: set[int], outbox_changed: threading.Event
    ) -> None:
        self._store = store
        self._settings = settings
        self._leased = leased
        self._outbox_changed = outbox_changed

    def begin(
        self,
        inbox_id: int,
        new: NewEscalation,
        budget: BudgetRow,
        *,
        bounds: tuple[int, int],
        request: OutboundMessage | None = None,
    ) -> Begun:
        """Move an event from the inbox here.

        Args:
            inbox_id: its place in the inbox.
            new: what it takes along.
            budget: what is left to its task afterwards.
            bounds: the most escalations, and the most bytes of them, that may wait.
            request: the question, where it goes out through the outbox.

        Returns:
            FULL beyond the bounds, GONE when the event is no longer in the inbox; then nothing was written.

        Raises:
            TransientError: ``disk.full`` or ``spool.busy``: the event still waits in the inbox, under the same lease.
        """
        with self._store.transaction() as db:
            if (row := inbox_row(db, inbox_id)) is None:
                return Begun.GONE
            task, event_id, payload = row[:3]
            size_bytes = len(payload) + len(new.guess) + len(new.spec)
            if total(db, "escalations") >= bounds[0] or total(db, "escalations_bytes") + size_bytes > bounds[1]:
                return Begun.FULL
            db.execute("DELETE FROM inbox WHERE id = ?", (inbox_id,))
            seq = None if request is None else self._enqueue(db, request)
            db.execute(
                "INSERT INTO escalations (task, event_id, decision_id, destination, payload, guess, spec, boot_id,"
                " begun_ms, timeout_ms, request_seq, size_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    task, event_id, new.decision_id, new.destination, payload, new.guess.decode(), new.spec.decode(),
                    new.boot_id, new.begun_ms, new.timeout_ms, seq, size_bytes,
                ),
            )  # fmt: skip
            self.keep_budget(task, budget)
        self._leased.discard(inbox_id)
        return Begun.BEGUN

    def budget(self, task: str) -> BudgetRow | None:
        """What the task may still ask; None before its first question."""
        with self._store.reading() as db:
            row = db.execute(
                "SELECT credit, boot_id, at_ms FROM escalation_budgets WHERE task = ?", (as_text(task),)
            ).fetchone()
        return None if row is None else BudgetRow(*row)

    def keep_budget(self, task: str, budget: BudgetRow) -> None:
        """Record what the task may still ask."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO escalation_budgets VALUES (?, ?, ?, ?)",
                (as_text(task), budget.credit, budget.boot_id, budget.at_ms),
            )

    def waiting(self) -> list[EscalationRow]:
        """Every pending escalation, the oldest first."""
        with self._store.reading() as db:
            rows = db.execute(f"SELECT {_ROW} FROM escalations ORDER BY id").fetchall()  # noqa: S608 - our own columns
        return [EscalationRow(*row) for row in rows]

    def find(self, task: str, decision_id: str) -> int | None:
        """The pending escalation that an answer is meant for; None when there is none (any more)."""
        with self._store.reading() as db:
            row = db.execute(
                "SELECT id FROM escalations WHERE decision_id = ? AND task = ?", (as_text(decision_id), as_text(task))
            ).fetchone()
        return None if row is None else int(row[0])

    def case(self, escalation_id: int) -> EscalationCase | None:
        """The content of a pending escalation; None when it was settled."""
        with self._store.reading() as db:
            row = db.execute(
                f"SELECT {_ROW}, payload, guess, spec FROM escalations WHERE id = ?",  # noqa: S608 - as above
                (escalation_id,),
            ).fetchone()
        if row is None:
            return None
        return EscalationCase(EscalationRow(*row[:-3]), row[-3], row[-2].encode(), row[-1].encode())

    def begin_anew(self, escalation_id: int, boot_id: str, begun_ms: int) -> None:
        """Let the wait begin anew: the machine was started since, and nobody knows how long it was off."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE escalations SET boot_id = ?, begun_ms = ?, power_cuts = power_cuts + 1 WHERE id = ?",
                (boot_id, begun_ms, escalation_id),
            )

    def note_attempt(self, escalation_id: int) -> None:
        """Record that the question is about to be put to the server."""
        with self._store.transaction() as db:
            db.execute("UPDATE escalations SET attempts = attempts + 1 WHERE id = ?", (escalation_id,))

    def settle(self, escalation_id: int, message: OutboundMessage, outcome: Outcome) -> bool:
        """Replace an escalation by the decision that ends it, in one transaction.

        Returns:
            False when it was settled before; then nothing was written.

        Raises:
            TransientError: ``disk.full`` or ``spool.busy``: it still waits.
        """
        with self._store.transaction() as db:
            row = db.execute(
                "DELETE FROM escalations WHERE id = ? RETURNING task, event_id, request_seq", (escalation_id,)
            ).fetchone()
            if row is None:
                return False
            # A question that was not sent yet is of no use to anyone.
            db.execute("DELETE FROM outbox WHERE seq = ?", (row[2],))
            remember(db, (row[0], row[1]), self._settings.answered_ids_max)
            self._enqueue(db, message)
            add_count(db, OUTCOME_PREFIX + outcome)
        return True

    def forget(self, escalation_id: int) -> tuple[str, str, bytes] | None:
        """Remove an escalation without a decision: the caller makes a dead letter of it in the same transaction.

        Returns:
            Task, event id and payload; None when it was settled before.
        """
        with self._store.transaction() as db:
            row: tuple[str, str, bytes, int | None] | None = db.execute(
                "DELETE FROM escalations WHERE id = ? RETURNING task, event_id, payload, request_seq", (escalation_id,)
            ).fetchone()
            if row is None:
                return None
            db.execute("DELETE FROM outbox WHERE seq = ?", (row[3],))
            remember(db, row[:2], self._settings.answered_ids_max)
        return row[:3]

    def give_up(self, inbox_id: int, message: OutboundMessage, outcome: Outcome) -> bool:
        """Replace an event that cannot be asked about by the decision that says so, in one transaction.

        Returns:
            False when the event is no longer in the inbox; then nothing was written.

        Raises:
            TransientError: ``disk.full`` or ``spool.busy``: the event still waits, under the same lease.
        """
        with self._store.transaction() as db:
            if (row := inbox_row(db, inbox_id)) is None:
                return False
            db.execute("DELETE FROM inbox WHERE id = ?", (inbox_id,))
            remember(db, row[:2], self._settings.answered_ids_max)
            self._enqueue(db, message)
            add_count(db, OUTCOME_PREFIX + outcome)
        self._leased.discard(inbox_id)
        return True

    def _enqueue(self, db: sqlite3.Connection, message: OutboundMessage) -> int:
        seq = enqueue(db, message, self._settings.outbox_max_bytes)
        self._outbox_changed.set()
        return seq


def split_counters(rows: Iterable[tuple[str, int]]) -> tuple[collections.Counter[str], dict[str, int]]:
    """A spool's counters: the drops by reason, and the ends of escalations by outcome."""
    dropped: collections.Counter[str] = collections.Counter()
    outcomes: dict[str, int] = {}
    for name, n in sorted(rows):
        if name.startswith(OUTCOME_PREFIX):
            outcomes[name.removeprefix(OUTCOME_PREFIX)] = n
        else:
            dropped[name] = n
    return dropped, outcomes
