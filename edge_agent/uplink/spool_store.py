"""The SQLite file under the spool: opening, schema, corruption at start, transactions and error mapping.

One connection, one lock. paho's thread never comes here; the intake thread, the drain and the agent loop take turns
on the lock for the length of one short transaction. A connection per thread would only move that waiting into
SQLite's busy loop, which polls. Other processes (``edge-agent dead-letters``) open the file themselves: WAL lets them
read at any time.

Durability: WAL with ``synchronous=FULL`` syncs the log at every commit, so what a method returned is on the disk; the
directory is synced once, when the file is created. ``batch`` puts many writes behind one such sync.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError, from_os_error
from edge_agent.fs import fsync_dir
from edge_agent.log import get_logger

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 5.0
NEARLY_FULL_BYTES = 256 * 1024

# The file as version 1 made it. Never edited: an older file and a new one must come out of the steps below alike.
# Totals are kept by triggers, so that the bounds can be checked without counting rows, also when another process
# (a person who requeues a dead letter) writes.
SCHEMA = """
CREATE TABLE inbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, event_id TEXT NOT NULL, payload BLOB NOT NULL,
  lane INTEGER NOT NULL, received_ms INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  UNIQUE (task, event_id));
CREATE INDEX inbox_order ON inbox (lane, id);
CREATE TABLE answered (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, event_id TEXT NOT NULL, UNIQUE (task, event_id));
CREATE TABLE outbox (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, class_seq INTEGER NOT NULL, klass INTEGER NOT NULL, topic TEXT NOT NULL,
  payload BLOB NOT NULL, qos INTEGER NOT NULL, retain INTEGER NOT NULL, content_type TEXT,
  user_properties TEXT NOT NULL, size_bytes INTEGER NOT NULL, queued_ms INTEGER NOT NULL);
CREATE INDEX outbox_class ON outbox (klass, seq);
CREATE TABLE dead_letters (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT, event_id TEXT, payload BLOB, lane INTEGER NOT NULL,
  received_ms INTEGER NOT NULL, buried_ms INTEGER NOT NULL, code TEXT NOT NULL, kind TEXT NOT NULL,
  detail TEXT NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE totals (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO totals VALUES ('inbox', 0), ('outbox', 0), ('outbox_bytes', 0), ('dead_letters', 0);
CREATE TRIGGER inbox_in AFTER INSERT ON inbox BEGIN UPDATE totals SET n = n + 1 WHERE name = 'inbox'; END;
CREATE TRIGGER inbox_out AFTER DELETE ON inbox BEGIN UPDATE totals SET n = n - 1 WHERE name = 'inbox'; END;
CREATE TRIGGER outbox_in AFTER INSERT ON outbox BEGIN
  UPDATE totals SET n = n + 1 WHERE name = 'outbox';
  UPDATE totals SET n = n + new.size_bytes WHERE name = 'outbox_bytes'; END;
CREATE TRIGGER outbox_out AFTER DELETE ON outbox BEGIN
  UPDATE totals SET n = n - 1 WHERE name = 'outbox';
  UPDATE totals SET n = n - old.size_bytes WHERE name = 'outbox_bytes'; END;
CREATE TRIGGER dead_in AFTER INSERT ON dead_letters BEGIN UPDATE totals SET n = n + 1 WHERE name = 'dead_letters'; END;
CREATE TRIGGER dead_out AFTER DELETE ON dead_letters BEGIN UPDATE totals SET n = n - 1 WHERE name = 'dead_letters'; END;
"""

# From version 1 to 2: events that wait for an answer from elsewhere. A step only adds, and may be repeated: another
# process may have taken it a moment ago, and one of the version before that still runs goes on undisturbed.
ESCALATIONS = """
CREATE TABLE IF NOT EXISTS escalations (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, event_id TEXT NOT NULL, decision_id TEXT NOT NULL UNIQUE,
  destination TEXT NOT NULL, payload BLOB NOT NULL, guess TEXT NOT NULL, spec TEXT NOT NULL, boot_id TEXT NOT NULL,
  begun_ms INTEGER NOT NULL, timeout_ms INTEGER NOT NULL, power_cuts INTEGER NOT NULL DEFAULT 0,
  attempts INTEGER NOT NULL DEFAULT 0, request_seq INTEGER, size_bytes INTEGER NOT NULL, UNIQUE (task, event_id));
CREATE TABLE IF NOT EXISTS escalation_budgets (
  task TEXT PRIMARY KEY, credit REAL NOT NULL, boot_id TEXT NOT NULL, at_ms INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO totals VALUES ('escalations', 0), ('escalations_bytes', 0);
CREATE TRIGGER IF NOT EXISTS escalations_in AFTER INSERT ON escalations BEGIN
  UPDATE totals SET n = n + 1 WHERE name = 'escalations';
  UPDATE totals SET n = n + new.size_bytes WHERE name = 'escalations_bytes'; END;
CREATE TRIGGER IF NOT EXISTS escalations_out AFTER DELETE ON escalations BEGIN
  UPDATE totals SET n = n - 1 WHERE name = 'escalations';
  UPDATE totals SET n = n - old.size_bytes WHERE name = 'escalations_bytes'; END;
"""

_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_log = get_logger(__name__)


class SpoolStore:
    """An open spool file whose writes are transactions.

    Args:
        path: the file; its directory must exist.
        busy_timeout_s: how long to wait for another process that writes.
        is_owner: whether a corrupt file may be moved aside.

    Attributes:
        is_corrupt: damage was met since the file was opened; opening it again moves it aside.

    Raises:
        TransientError: ``disk.full`` or ``spool.busy``.
        PermanentError: ``spool.newer_schema``, ``spool.unusable`` or a ``disk.*`` code.
        IntegrityError: ``spool.corrupt``, for one that may not move it aside.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S, is_owner: bool = True) -> None:
        self.path = path
        self._is_owner = is_owner
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.RLock()
        self._depth = 0
        self._fault: EdgeError | None = None
        self.is_corrupt = False
        self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            try:
                return self._connect()
            except IntegrityError as error:
                if not self._is_owner:  # the daemon may be writing to it at this moment
                    raise
                moved = self._move_aside()
                _log.error("spool_corrupt", code="spool.corrupt", detail=error.detail, moved_to=str(moved))
                connection = self._connect()
                self.is_corrupt = False
                connection.execute("INSERT INTO counters VALUES ('spool.corrupt', 1)")
                return connection
        except OSError as error:
            raise from_os_error(error, "opening the spool") from error

    def _connect(self) -> sqlite3.Connection:
        # SQLite says "unable to open" for all of these; the file itself names the reason.
        os.close(os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY))
        is_new = not self.path.exists()
        if not is_new:
            os.close(os.open(self.path, os.O_RDWR))
        connection: sqlite3.Connection | None = None
        try:
            # isolation_level=None: transactions are begun and ended here and nowhere else.
            connection = sqlite3.connect(
                self.path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            _prepare(connection)
            if is_new:
                fsync_dir(self.path.parent)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                raise self._mapped(error, "opening the spool") from error
            raise
        return connection

    def _move_aside(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        number = 0
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}-{number}")
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                part.rename(aside.with_name(aside.name + suffix))
        fsync_dir(self.path.parent)
        return aside

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, or a part of the one that this thread has already begun.

        Raises:
            EdgeError: the mapped SQLite error. Nothing of the outermost transaction was then written, whatever its
                inner parts returned, because SQLite may have rolled it back on its own.
        """
        with self._lock:
            if self._depth:
                # SQLite may have ended the transaction with the fault: a further write would be one of its own.
                self._raise_fault()
                with self._part():
                    yield self._connection
                return
            self._fault = None
            with self._mapping("writing the spool"):
                self._connection.execute("BEGIN IMMEDIATE")
            try:
                with self._part():
                    yield self._connection
                self._raise_fault()
                with self._mapping("committing to the spool"):
                    self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                raise

    def _raise_fault(self) -> None:
        # A caller may have caught the error of one inner part; the transaction is lost all the same.
        if self._fault is not None:
            raise self._fault

    @contextlib.contextmanager
    def _part(self) -> Iterator[None]:
        self._depth += 1
        try:
            with self._mapping("writing the spool"):
                yield
        except EdgeError as error:
            if isinstance(error.__cause__, sqlite3.Error):
                self._fault = error
            raise
        finally:
            self._depth -= 1

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread has a transaction open (waits for another thread's to end)."""
        with self._lock:
            return self._depth > 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection for reading, under the lock."""
        with self._lock, self._mapping("reading the spool"):
            yield self._connection

    def close(self) -> None:
        """Close the file; the log is folded back into it."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._connection.close()

    @contextlib.contextmanager
    def _mapping(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._mapped(error, doing) from error

    def _mapped(self, error: sqlite3.Error, doing: str) -> EdgeError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        primary = code & 0xFF
        where = {"path": str(self.path)}
        if primary in _CORRUPT:
            self.is_corrupt = True
            return IntegrityError("spool.corrupt", f"{doing}: {error}", **where)
        if primary in _BUSY:
            return TransientError("spool.busy", f"{doing}: {error}", **where)
        if primary == sqlite3.SQLITE_FULL or (primary in _ROOM and self._is_nearly_full()):
            return TransientError("disk.full", f"{doing}: {error}", **where)
        if primary == sqlite3.SQLITE_READONLY:
            return PermanentError("disk.read_only", f"{doing}: {error}", **where)
        if primary in _ROOM:
            return TransientError("disk.io", f"{doing}: {error}", **where)
        return PermanentError("spool.unusable", f"{doing}: {error}", **where)

    def _is_nearly_full(self) -> bool:
        try:
            return shutil.disk_usage(self.path.parent).free < NEARLY_FULL_BYTES
        except OSError:
            return False


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise PermanentError("spool.newer_schema", f"spool has schema {version}, this agent knows {SCHEMA_VERSION}")
    if version and (verdict := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise IntegrityError("spool.corrupt", f"spool failed its check: {verdict}")
    if version < SCHEMA_VERSION:
        steps = (SCHEMA, ESCALATIONS)[version:]
        connection.executescript(f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
