"""SQL of single rows, inside a transaction that the caller holds."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Container, Iterator

from edge_agent.contract.event import MAX_EVENT_BYTES
from edge_agent.contract.messages import DeadLetter, ErrorInfo, now_ms
from edge_agent.errors import EdgeError
from edge_agent.uplink.records import KLASSES, LANES, InboxEvent, OutboundMessage

CLOCK_FLOOR_MS = 1_704_067_200_000  # 2024-01-01: a row stamped earlier was written before the clock was set
# Alarms and decisions are kept for the whole configured age; a metric that old describes nothing any more.
_AGE_SHARE = {"decision": 1.0, "alarm": 1.0, "telemetry": 1 / 168}

InboxRow = tuple[str, str, bytes, int, int, int]
"""task, event_id, payload, lane, received_ms, attempts"""
LetterEvent = tuple[str | None, str | None, bytes | None, int, int]
"""task, event_id, payload, lane, received_ms of an event that gets no decision"""


def enqueue(db: sqlite3.Connection, message: OutboundMessage, max_bytes: int) -> int:
    """Append a message; over ``max_bytes`` drop the oldest of the lowest class, and count each.

    Returns:
        Its number in the outbox.
    """
    number = KLASSES.index(message.klass)
    name = f"seq.{message.klass}"
    db.execute("INSERT INTO totals VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1", (name,))
    newest = db.execute(
        "INSERT INTO outbox (class_seq, klass, topic, payload, qos, retain, content_type, user_properties,"
        " size_bytes, queued_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            total(db, name), number, message.topic, message.payload, message.qos, message.retain,
            message.content_type, json.dumps(message.user_properties), message.size_bytes, now_ms(),
        ),
    ).lastrowid or 0  # fmt: skip
    excess = total(db, "outbox_bytes") - max_bytes
    if excess <= 0:
        return newest
    victims: list[tuple[int]] = []
    for seq, klass, size_bytes in db.execute("SELECT seq, klass, size_bytes FROM outbox ORDER BY klass DESC, seq"):
        if excess <= 0:
            break
        victims.append((seq,))
        excess -= size_bytes
        add_count(db, f"outbox.full.{KLASSES[klass]}")
    db.executemany("DELETE FROM outbox WHERE seq = ?", victims)
    return newest


def waiting_events(db: sqlite3.Connection, leased: Container[int]) -> Iterator[InboxEvent]:
    """Events of the inbox in the order in which they are to be answered, but for those that are leased."""
    # Leases are few, so skipping over them is cheaper than telling SQLite about them.
    for row in db.execute(
        "SELECT id, task, event_id, payload, lane, received_ms, attempts FROM inbox ORDER BY lane, id"
    ):
        if row[0] not in leased:
            yield InboxEvent(row[0], row[1], row[2], row[3], LANES[row[4]], row[5], row[6])


def alike_events(db: sqlite3.Connection, leased: Container[int], event: InboxEvent, limit: int) -> list[InboxEvent]:
    """Events that come next without a gap, of the same task and lane as ``event``, and cost no worker so far."""
    following = itertools.islice(waiting_events(db, leased), limit)
    return [*itertools.takewhile(lambda one: one.is_like(event) and not one.attempts, following)]


def as_text(value: str) -> str:
    """The string in a form that UTF-8 can carry."""
    # A lone surrogate is legal in a JSON escape and illegal in UTF-8, which SQLite and MQTT speak.
    return value.encode("utf-8", "backslashreplace").decode()


def add_count(db: sqlite3.Connection, name: str, n: int = 1) -> None:
    """Add to a persistent counter."""
    db.execute("INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n", (name, n))


def total(db: sqlite3.Connection, name: str) -> int:
    """A total that the triggers keep: rows of a table (``inbox``), its ``…_bytes``, or ``seq.<class>``."""
    return int(db.execute("SELECT n FROM totals WHERE name = ?", (name,)).fetchone()[0])


def is_known(db: sqlite3.Connection, key: tuple[str, str]) -> bool:
    """Whether the event (task, event_id) waits, is asked about elsewhere, or is among the remembered answers."""
    return any(
        db.execute(f"SELECT 1 FROM {table} WHERE task = ? AND event_id = ?", key).fetchone() is not None  # noqa: S608
        for table in ("inbox", "escalations", "answered")
    )


def remember(db: sqlite3.Connection, key: tuple[str, str], max_ids: int) -> None:
    """Note that the event (task, event_id) was answered, and forget the oldest beyond ``max_ids``."""
    newest = db.execute("INSERT OR REPLACE INTO answered (task, event_id) VALUES (?, ?)", key).lastrowid or 0
    db.execute("DELETE FROM answered WHERE id <= ?", (newest - max_ids,))


def inbox_row(db: sqlite3.Connection, inbox_id: int) -> InboxRow | None:
    """One row of the inbox, or None when it has left."""
    row: InboxRow | None = db.execute(
        "SELECT task, event_id, payload, lane, received_ms, attempts FROM inbox WHERE id = ?", (inbox_id,)
    ).fetchone()
    return row


def message_of(row: tuple[str, bytes, int, int, int, str | None, str]) -> OutboundMessage:
    """The message in the columns topic, payload, qos, retain, klass, content_type, user_properties."""
    topic, payload, qos, retain, klass, content_type, properties = row
    pairs = tuple((str(name), str(value)) for name, value in json.loads(properties))
    return OutboundMessage(topic, payload, qos, bool(retain), KLASSES[klass], content_type, pairs)


def insert_letter(
    db: sqlite3.Connection, event: LetterEvent, error: EdgeError, max_letters: int
) -> tuple[int, DeadLetter]:
    """Add a dead letter, counted under its code; beyond ``max_letters`` the oldest is forgotten, and counted.

    Returns:
        Its id, and what is announced of it.
    """
    task, event_id, payload, lane, received_ms = event
    task = None if task is None else as_text(task)[:128]
    event_id = None if event_id is None else as_text(event_id)
    kept = payload if payload is not None and len(payload) <= MAX_EVENT_BYTES else None
    detail = as_text(error.detail)[:1000]
    newest = db.execute(
        "INSERT INTO dead_letters (task, event_id, payload, lane, received_ms, buried_ms, code, kind, detail)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (task, event_id, kept, lane, received_ms, now_ms(), error.code, error.kind, detail),
    ).lastrowid
    add_count(db, error.code)
    excess = total(db, "dead_letters") - max_letters
    if excess > 0:
        db.execute("DELETE FROM dead_letters WHERE id IN (SELECT id FROM dead_letters ORDER BY id LIMIT ?)", (excess,))
        add_count(db, "deadletter.trimmed", excess)
    info = ErrorInfo(code=error.code, type=error.kind, detail=detail)
    return newest or 0, DeadLetter(event_id=event_id, task=task, error=info, received_ms=received_ms)


def last_seq(db: sqlite3.Connection) -> int:
    """The highest number ever given to a message of the outbox; 0 before the first."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    return 0 if row is None else int(row[0])


def restamp(db: sqlite3.Connection, first_seq: int, *, until: int, by: int) -> None:
    """Move the stamps up to ``until`` (ms) of messages from ``first_seq`` on by so many ms."""
    db.execute("UPDATE outbox SET queued_ms = queued_ms + ? WHERE seq >= ? AND queued_ms <= ?", (by, first_seq, until))


def drop_expired(db: sqlite3.Connection, at: int, max_age_s: float) -> int:
    """Drop messages that are older at ``at`` (ms) than their class may be, and count them; how many there were."""
    dropped = 0
    for number, klass in enumerate(KLASSES):
        oldest = at - round(max_age_s * 1000 * _AGE_SHARE[klass])
        # Before the clock was set nothing has an age; the bound by bytes still holds for such rows.
        count = db.execute(
            "DELETE FROM outbox WHERE klass = ? AND queued_ms >= ? AND queued_ms < ?", (number, CLOCK_FLOOR_MS, oldest)
        ).rowcount
        if count:
            add_count(db, f"outbox.expired.{klass}", count)
        dropped += count
    return dropped


def monotonic_ms() -> int:
    """Time since an arbitrary start, which no setting of the clock moves."""
    return round(time.monotonic() * 1000)
