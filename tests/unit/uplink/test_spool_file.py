"""The spool's file: damaged, of a newer agent, held by another process."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from edge_agent.errors import IntegrityError, PermanentError, RefusedError, TransientError
from edge_agent.uplink.records import Accepted
from edge_agent.uplink.spool_store import SpoolStore
from tests.unit.uplink.conftest import make_spool, put


def test_a_corrupt_file_is_moved_aside_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spool.sqlite"
    path.write_bytes(b"this is no database " * 500)
    spool = make_spool(path)
    assert put(spool, "a") is Accepted
    assert spool.counts().dropped == {"spool.corrupt": 1}
    [aside] = tmp_path.glob("spool.sqlite.corrupt-*")
    assert aside.read_bytes().startswith(b"this is no database")
    spool.close()


def test_damage_in_the_middle_of_the_file_is_found_at_start(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    spool = make_spool(path)
    for number in range(200):
        spool.bury(None, RefusedError("event.not_json", "no"), task="triage", payload=b"x" * 500, event_id=str(number))
    spool.close()
    content = bytearray(path.read_bytes())
    # Every page from the fourth on: interior damage that the header does not betray.
    content[3 * 4096 :] = b"\xff" * (len(content) - 3 * 4096)
    path.write_bytes(content)
    again = make_spool(path)
    assert again.counts().dropped == {"spool.corrupt": 1}
    assert list(tmp_path.glob("spool.sqlite.corrupt-*"))


def test_a_spool_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    make_spool(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(PermanentError) as caught:
        make_spool(path)
    assert caught.value.code == "spool.newer_schema"
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_a_missing_directory_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        make_spool(tmp_path / "absent" / "spool.sqlite")
    assert caught.value.code == "disk.missing"


def test_a_file_that_another_process_holds_is_a_transient_error(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    store = SpoolStore(path, busy_timeout_s=0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransientError) as caught, store.transaction():
        pass
    assert caught.value.code == "spool.busy"
    other.execute("ROLLBACK")
    other.close()
    with store.transaction() as db:
        db.execute("INSERT INTO counters VALUES ('x', 1)")
    store.close()


def test_another_process_may_read_dead_letters_while_the_daemon_writes(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool.sqlite")
    spool.bury(None, RefusedError("event.not_json", "no"), task="triage", payload=b"{")
    reader = make_spool(tmp_path / "spool.sqlite")
    with spool.batch():
        put(spool, "a")
        assert len(reader.dead_letters()) == 1
    assert reader.counts().inbox == 1


def test_damage_that_one_thread_meets_is_seen_by_the_others(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    spool = make_spool(path)
    with spool.batch():
        for number in range(4000):  # more than SQLite's page cache holds
            spool.accept("triage", str(number), b"x" * 1000, "normal", 1)
    before = spool.is_corrupt
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * (path.stat().st_size - 8 * 4096))

    def repeat_them() -> None:
        for number in range(4000):
            spool.accept("triage", str(number), b"x", "normal", 1)

    with pytest.raises(IntegrityError):
        repeat_them()
    assert (before, spool.is_corrupt) == (False, True)
    spool.close()
    assert not make_spool(path).is_corrupt, "the next start moves it aside"
