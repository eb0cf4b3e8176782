"""Inbox, outbox, escalations and dead letters of one node, in one SQLite file.

Rules:
- ``accept`` returns only when the event is durable; the caller acknowledges afterwards.
- ``complete`` and ``bury`` remove an event and record what became of it in one transaction: after a power cut an
  event is either still waiting or answered, never both and never neither.
- An event id that waits or was answered is a duplicate: acknowledged, counted, not answered again.
- Everything is bounded. What is dropped to keep a bound is counted by reason and, where it was an event, becomes a
  dead letter.
- There is no edge from an outbox row back to an event: a decision that cannot be delivered is never decided again.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edge_agent.contract.messages import QueueTelemetry, now_ms
from edge_agent.errors import EdgeError, PermanentError, RefusedError, TransientError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import (
    LANES,
    Acceptance,
    Accepted,
    BuriedEvent,
    Duplicate,
    InboxEvent,
    OutboundMessage,
    Priority,
    QueuedMessage,
)
from edge_agent.uplink.spool_escalations import EscalationQueue, split_counters
from edge_agent.uplink.spool_rows import (
    InboxRow,
    LetterEvent,
    add_count,
    alike_events,
    as_text,
    drop_expired,
    enqueue,
    inbox_row,
    insert_letter,
    is_known,
    last_seq,
    message_of,
    monotonic_ms,
    remember,
    restamp,
    total,
    waiting_events,
)
from edge_agent.uplink.spool_store import SpoolStore

MAX_ATTEMPTS = 2
CLOCK_LEAP_MS = 60_000


class Spool:
    """Durable queues between the broker and the worker. All methods may be called from any thread.

    Args:
        path: the SQLite file; created when missing, moved aside when corrupt.
        settings: bounds.
        deadletter_topic: where buried events are announced (QoS 1); None announces only what ``bury`` is given.
        is_owner: False for a visitor beside the daemon, who leaves a corrupt file where it is.

    Attributes:
        inbox_changed: set whenever an event was accepted; whoever waits on it clears it before looking.
        outbox_changed: set whenever a message was queued; the uplink waits on it.
        escalations: events that wait for an answer from elsewhere.

    Raises:
        TransientError: ``disk.full`` or ``spool.busy``.
        PermanentError: ``spool.newer_schema``, ``spool.unusable`` or a ``disk.*`` code.
        IntegrityError: ``spool.corrupt``, for a visitor only.
    """

    def __init__(
        self, path: Path, settings: SpoolSettings, *, deadletter_topic: str | None = None, is_owner: bool = True
    ) -> None:
        self._settings = settings
        self._deadletter_topic = deadletter_topic
        self._store = SpoolStore(path, is_owner=is_owner)
        self.inbox_changed = threading.Event()
        self.outbox_changed = threading.Event()
        self._leased: set[int] = set()
        self.escalations = EscalationQueue(self._store, settings, self._leased, self.outbox_changed)
        self._clocks = now_ms(), monotonic_ms()
        with self._store.reading() as db:
            self._first_seq = last_seq(db) + 1
        self._uncounted: collections.Counter[str] = collections.Counter()

    @property
    def is_corrupt(self) -> bool:
        """Whether any thread met damage in the file: only a restart, which moves it aside, helps."""
        return self._store.is_corrupt

    def close(self) -> None:
        """Close the file. Whatever was committed is in it."""
        self._store.close()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Put the writes of the enclosed calls behind one commit.

        What they return holds only once this block has been left without an error.

        Raises:
            TransientError: ``disk.full`` and the like: nothing of the whole batch was written.
        """
        with self._store.transaction():
            yield

    # ---- inbox

    def accept(self, task: str, event_id: str, payload: bytes, priority: Priority, received_ms: int) -> Acceptance:
        """Take an event into the inbox.

        A full inbox gives up the oldest event of its lowest lane for one of a higher lane (it becomes the dead letter
        ``inbox.displaced``); otherwise the newcomer is refused.

        Returns:
            ``Accepted``, or ``Duplicate`` when this id waits already or was answered.

        Raises:
            TransientError: ``inbox.full``, ``disk.full`` or ``spool.busy``: the event was not taken.
        """
        with self._store.transaction() as db:
            key = (as_text(task), as_text(event_id))
            if is_known(db, key):
                add_count(db, "event.duplicate")
                return Duplicate
            if not self._make_room(db, LANES.index(priority)):
                bound = self._settings.inbox_max_events
                raise TransientError("inbox.full", f"the inbox holds {bound} events and none is of a lower lane")
            db.execute(
                "INSERT INTO inbox (task, event_id, payload, lane, received_ms) VALUES (?, ?, ?, ?, ?)",
                (*key, payload, LANES.index(priority), received_ms),
            )
        self.inbox_changed.set()
        return Accepted

    def next_event(self) -> InboxEvent | None:
        """Lease the next event that nobody works on, until it is answered, buried or given back, or None."""
        with self._store.reading() as db:
            event = next(waiting_events(db, self._leased), None)
            self._leased.update([event.inbox_id] if event else [])
        return event

    def next_alike(self, event: InboxEvent, limit: int) -> list[InboxEvent]:
        """Lease events that come next and may be answered together with ``event``; none is overtaken."""
        with self._store.reading() as db:
            alike = alike_events(db, self._leased, event, limit)
            self._leased.update(one.inbox_id for one in alike)
        return alike

    def release(self, inbox_id: int) -> None:
        """Give an event back unanswered; it keeps its place."""
        self._leased.discard(inbox_id)

    def complete(self, inbox_id: int, messages: Sequence[OutboundMessage]) -> bool:
        """Replace an event by the messages that answer it, in one transaction.

        Returns:
            False when the event is no longer in the inbox; then nothing was written.

        Raises:
            TransientError: ``disk.full`` or ``spool.busy``: the event still waits, under the same lease.
        """
        with self._store.transaction() as db:
            if (row := inbox_row(db, inbox_id)) is None:
                return False
            self._remove(db, inbox_id, row)
            for message in messages:
                self._enqueue(db, message)
        self._leased.discard(inbox_id)
        return True

    def worker_died(self, inbox_id: int, fault: EdgeError) -> bool:
        """Record that a worker was lost over this event, by ``fault``, and end the lease.

        Returns:
            True when that was the second time and the event was buried as ``event.poison``.
        """
        buried = False
        with self._store.transaction() as db:
            db.execute("UPDATE inbox SET attempts = attempts + 1 WHERE id = ?", (inbox_id,))
            row = inbox_row(db, inbox_id)
            if row is not None and row[5] >= MAX_ATTEMPTS:
                error = PermanentError("event.poison", f"lost {row[5]} workers over this event, at last: {fault}")
                buried = self.bury(inbox_id, error) is not None
        self._leased.discard(inbox_id)
        return buried

    # ---- dead letters

    def bury(
        self,
        inbox_id: int | None,
        error: EdgeError,
        message: OutboundMessage | None = None,
        *,
        task: str | None = None,
        event_id: str | None = None,
        payload: bytes | None = None,
        received_ms: int | None = None,
    ) -> int | None:
        """Make a dead letter of an event, and count it under the error's code.

        Args:
            inbox_id: the event's place in the inbox, where its own facts are taken from; None for one that never got
                there.
            error: why there is no decision.
            message: announced in the same transaction; None announces on the dead-letter topic.
            task: as the sender named it, where known.
            event_id: the event's id, where one could be read.
            payload: kept up to 64 KiB; larger ones are buried without content.
            received_ms: wall clock in ms since the epoch; default: now.

        Returns:
            The dead letter's id, or None when ``inbox_id`` is no longer in the inbox (nothing was written).
        """
        with self._store.transaction() as db:
            lane = LANES.index("normal")
            if inbox_id is not None:
                if (row := inbox_row(db, inbox_id)) is None:
                    return None
                task, event_id, payload, lane, received_ms = row[:5]
                self._remove(db, inbox_id, row)
            when = now_ms() if received_ms is None else received_ms
            letter_id = self._insert_letter(db, (task, event_id, payload, lane, when), error, message)
        if inbox_id is not None:
            self._leased.discard(inbox_id)
        return letter_id

    def dead_letters(self, limit: int = 100) -> list[BuriedEvent]:
        """The newest dead letters, newest first."""
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT id, event_id, task, payload, lane, received_ms, buried_ms, code, kind, detail"
                " FROM dead_letters ORDER BY id DESC LIMIT ?",
                (limit,),
            ).fetchall()
        return [BuriedEvent(r[0], r[1], r[2], r[3], LANES[r[4]], r[5], r[6], r[7], r[8], r[9]) for r in rows]

    def requeue(self, dead_letter_id: int) -> Acceptance:
        """Put a dead letter back into the inbox with a clean record; it will be answered even if its id was before.

        Raises:
            RefusedError: ``deadletter.unknown`` or ``deadletter.no_content``.
            TransientError: ``inbox.full`` and the like; the dead letter stays.
        """
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT task, event_id, payload, lane, received_ms FROM dead_letters WHERE id = ?", (dead_letter_id,)
            ).fetchone()
            if row is None:
                raise RefusedError("deadletter.unknown", f"there is no dead letter {dead_letter_id}")
            task, event_id, payload, lane, received_ms = row
            if payload is None or task is None:
                raise RefusedError("deadletter.no_content", f"dead letter {dead_letter_id} has no content to decide on")
            key = (task, event_id if event_id is not None else f"deadletter-{dead_letter_id}")
            db.execute("DELETE FROM answered WHERE task = ? AND event_id = ?", key)
            outcome = self.accept(*key, payload, LANES[lane], received_ms)
            db.execute("DELETE FROM dead_letters WHERE id = ?", (dead_letter_id,))
        return outcome

    # ---- outbox

    def enqueue(self, message: OutboundMessage) -> None:
        """Put a message that answers no event (an alarm) into the outbox."""
        with self._store.transaction() as db:
            self._enqueue(db, message)

    def pending(self, limit: int, *, after_seq: int = 0) -> list[QueuedMessage]:
        """The next ``limit`` messages to send, in the order in which they were queued."""
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT seq, class_seq, queued_ms, topic, payload, qos, retain, klass, content_type, user_properties"
                " FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?",
                (after_seq, limit),
            ).fetchall()
        return [QueuedMessage(row[0], row[1], message_of(row[3:]), row[2]) for row in rows]

    def delete(self, seqs: Iterable[int]) -> None:
        """Forget messages that the broker has acknowledged."""
        with self._store.transaction() as db:
            db.executemany("DELETE FROM outbox WHERE seq = ?", [(seq,) for seq in seqs])

    def drop(self, seq: int, error: EdgeError) -> None:
        """Give up a message that the broker will never take: a dead letter without a task, which cannot be requeued."""
        with self._store.transaction() as db:
            row = db.execute("SELECT topic, payload FROM outbox WHERE seq = ?", (seq,)).fetchone()
            if row is None:
                return
            db.execute("DELETE FROM outbox WHERE seq = ?", (seq,))
            # No edge from a refused announcement to another announcement: that would never end.
            if row[0] == self._deadletter_topic:
                add_count(db, error.code)
            else:
                self._insert_letter(db, (None, None, row[1], LANES.index("normal"), now_ms()), error, None)

    def expire(self, now: int | None = None, *, steady_ms: int | None = None) -> int:
        """Drop messages beyond the age of their class.

        Args:
            now: wall clock in ms since the epoch; default: now.
            steady_ms: monotonic clock in ms; default: now.

        Returns:
            How many were dropped.
        """
        at, steady = now_ms() if now is None else now, monotonic_ms() if steady_ms is None else steady_ms
        with self._store.transaction() as db:
            # A clock that is set forward (by the network, on a machine without a clock of its own) ages nothing.
            leap_ms = (at - self._clocks[0]) - (steady - self._clocks[1])
            if leap_ms > CLOCK_LEAP_MS:
                restamp(db, self._first_seq, until=at - leap_ms, by=leap_ms)
            dropped = drop_expired(db, at, self._settings.outbox_max_age_s)
        self._clocks = at, steady
        return dropped

    # ---- counters

    def count(self, reason: str, n: int = 1) -> None:
        """Count a drop that happened outside the spool. Outside a batch a full disk only delays the writing.

        Raises:
            TransientError: inside a batch, which is then lost as a whole and counted again when it is tried again.
        """
        if self._store.is_inside:
            with self._store.transaction() as db:
                add_count(db, reason, n)
            return
        self._uncounted[reason] += n
        # Under one lock, and cleared after the commit: a full disk may show itself only there.
        with contextlib.suppress(EdgeError), self._store.reading():
            with self._store.transaction() as db:
                for name, delayed in self._uncounted.items():
                    add_count(db, name, delayed)
            self._uncounted.clear()

    def counts(self) -> QueueTelemetry:
        """Depths and every counter since the file was created."""
        with self._store.reading() as db:
            totals = dict(db.execute("SELECT name, n FROM totals").fetchall())
            dropped, outcomes = split_counters(db.execute("SELECT name, n FROM counters").fetchall())
        return QueueTelemetry(
            inbox=totals["inbox"],
            outbox=totals["outbox"],
            dead_letters=totals["dead_letters"],
            dropped=dict(sorted((dropped + self._uncounted).items())),
            escalations_pending=totals["escalations"],
            escalations=outcomes,
            timestamp_ms=now_ms(),
        )

    # ---- parts of a transaction

    def _make_room(self, db: sqlite3.Connection, lane: int) -> bool:
        if total(db, "inbox") < self._settings.inbox_max_events:
            return True
        row = db.execute(
            "SELECT task, event_id, payload, lane, received_ms, id FROM inbox"
            " WHERE lane > ? AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY lane DESC, id LIMIT 1",
            (lane, json.dumps(sorted(self._leased))),
        ).fetchone()
        if row is None:
            return False
        db.execute("DELETE FROM inbox WHERE id = ?", (row[5],))
        # Not remembered as answered: a sender who repeats it deserves another try.
        error = TransientError("inbox.displaced", f"displaced by an event of lane {LANES[lane]} from a full inbox")
        self._insert_letter(db, row[:5], error, None)
        return True

    def _remove(self, db: sqlite3.Connection, inbox_id: int, row: InboxRow) -> None:
        db.execute("DELETE FROM inbox WHERE id = ?", (inbox_id,))
        remember(db, row[:2], self._settings.answered_ids_max)

    def _insert_letter(
        self, db: sqlite3.Connection, event: LetterEvent, error: EdgeError, message: OutboundMessage | None
    ) -> int:
        letter_id, letter = insert_letter(db, event, error, self._settings.dead_letters_max)
        if message is None and self._deadletter_topic is not None:
            content = letter.model_dump_json().encode()
            message = OutboundMessage(self._deadletter_topic, content, klass="alarm", content_type="application/json")
        if message is not None:
            self._enqueue(db, message)
        return letter_id

    def _enqueue(self, db: sqlite3.Connection, message: OutboundMessage) -> None:
        enqueue(db, message, self._settings.outbox_max_bytes)
        self.outbox_changed.set()
