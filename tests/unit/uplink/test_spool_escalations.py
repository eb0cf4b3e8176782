"""Between inbox and outbox: an escalated event is in exactly one place, and leaves it exactly once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.messages import now_ms
from edge_agent.errors import PermanentError, TransientError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import (
    Accepted,
    BudgetRow,
    Duplicate,
    InboxEvent,
    NewEscalation,
    OutboundMessage,
)
from edge_agent.uplink.spool import Spool
from edge_agent.uplink.spool_escalations import Begun
from edge_agent.uplink.spool_store import SCHEMA_VERSION

ROOMY = (100, 1 << 20)
BUDGET = BudgetRow(59.0, "boot-1", 1000)
CHILD = Path(__file__).with_name("escalation_child.py")
ROOT = Path(__file__).parents[3]
VERSION_1 = Path(__file__).with_name("spool_v1.sql")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    one = Spool(tmp_path / "spool.sqlite", SpoolSettings())
    yield one
    one.close()


def new(event_id: str) -> NewEscalation:
    return NewEscalation(f"id-{event_id}", "http", b'{"guess":1}', b'{"spec":1}', "boot-1", 1000, 30_000)


def taken(spool: Spool, event_id: str) -> InboxEvent:
    assert spool.accept("triage", event_id, b'{"id":"x"}', "normal", now_ms()) is Accepted
    row = spool.next_event()
    assert row is not None
    return row


def escalated(spool: Spool, event_id: str, request: OutboundMessage | None = None) -> int:
    row = taken(spool, event_id)
    assert spool.escalations.begin(row.inbox_id, new(event_id), BUDGET, bounds=ROOMY, request=request) is Begun.BEGUN
    return spool.escalations.waiting()[-1].escalation_id


def decision(text: str) -> OutboundMessage:
    return OutboundMessage("plant/_edgeai/triage", text.encode())


def sent(spool: Spool) -> list[str]:
    return [queued.message.payload.decode() for queued in spool.pending(100)]


def test_an_escalated_event_leaves_the_inbox_and_is_a_duplicate_while_it_waits(spool: Spool) -> None:
    escalated(spool, "a")
    counts = spool.counts()
    assert (counts.inbox, counts.outbox, counts.escalations_pending) == (0, 0, 1)
    assert spool.next_event() is None
    assert spool.accept("triage", "a", b"{}", "normal", 1) is Duplicate


def test_the_memory_of_answers_may_forget_it_and_it_is_a_duplicate_still(tmp_path: Path) -> None:
    settings = SpoolSettings.model_construct(**{**SpoolSettings().model_dump(), "answered_ids_max": 1})
    spool = Spool(tmp_path / "spool.sqlite", settings)
    escalated(spool, "a")
    for number in range(3):
        spool.complete(taken(spool, str(number)).inbox_id, [])
    assert spool.accept("triage", "a", b"{}", "normal", 1) is Duplicate
    spool.close()


def test_it_is_settled_once_and_by_the_first(spool: Spool) -> None:
    number = escalated(spool, "a")
    assert spool.escalations.settle(number, decision("answer"), "answered")
    assert not spool.escalations.settle(number, decision("best guess"), "timed_out")
    assert sent(spool) == ["answer"]
    assert spool.counts().escalations == {"answered": 1}
    assert spool.counts().escalations_pending == 0
    assert spool.accept("triage", "a", b"{}", "normal", 1) is Duplicate


def test_of_two_threads_that_settle_at_the_same_moment_one_publishes(spool: Spool) -> None:
    for turn in range(20):
        number, gate = escalated(spool, str(turn)), threading.Barrier(2)
        won: list[bool] = []

        def settle(text: str, number: int = number, gate: threading.Barrier = gate, won: list[bool] = won) -> None:
            gate.wait()
            won.append(spool.escalations.settle(number, decision(text), "answered"))

        rivals = [threading.Thread(target=settle, args=(f"{turn}-{side}",)) for side in "ab"]
        for rival in rivals:
            rival.start()
        for rival in rivals:
            rival.join()
        assert sorted(won) == [False, True]
    assert len(sent(spool)) == 20


def test_beyond_its_bounds_nothing_moves_and_the_event_keeps_its_lease(spool: Spool) -> None:
    escalated(spool, "a")
    row = taken(spool, "b")
    for bounds in ((1, 1 << 20), (100, 40)):
        assert spool.escalations.begin(row.inbox_id, new("b"), BUDGET, bounds=bounds) is Begun.FULL
    assert spool.counts().inbox == 1
    assert spool.next_event() is None
    assert spool.complete(row.inbox_id, [decision("best guess")])


def test_an_event_that_has_left_the_inbox_is_not_escalated(spool: Spool) -> None:
    row = taken(spool, "a")
    spool.complete(row.inbox_id, [decision("answer")])
    assert spool.escalations.begin(row.inbox_id, new("a"), BUDGET, bounds=ROOMY) is Begun.GONE
    assert spool.escalations.budget("triage") is None


def test_a_question_that_was_not_sent_is_withdrawn_with_its_answer(spool: Spool) -> None:
    number = escalated(spool, "a", request=decision("question"))
    escalated(spool, "b", request=decision("another question"))
    assert sent(spool) == ["question", "another question"]
    spool.escalations.settle(number, decision("best guess"), "timed_out")
    assert sent(spool) == ["another question", "best guess"]


def test_an_answer_finds_its_question_by_task_and_decision_id(spool: Spool) -> None:
    number = escalated(spool, "a")
    assert spool.escalations.find("triage", "id-a") == number
    assert spool.escalations.find("other", "id-a") is None
    assert spool.escalations.find("triage", "id-\ud800") is None
    spool.escalations.settle(number, decision("x"), "answered")
    assert spool.escalations.find("triage", "id-a") is None
    assert spool.escalations.case(number) is None


def test_what_waits_survives_a_restart_with_its_wait_and_attempts(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.sqlite", SpoolSettings())
    number = escalated(spool, "a")
    spool.escalations.note_attempt(number)
    spool.escalations.begin_anew(number, "boot-2", 5)
    spool.close()
    again = Spool(tmp_path / "spool.sqlite", SpoolSettings())
    [row] = again.escalations.waiting()
    assert (row.boot_id, row.begun_ms, row.timeout_ms, row.power_cuts, row.attempts) == ("boot-2", 5, 30_000, 1, 1)
    case = again.escalations.case(number)
    assert case is not None
    assert (case.payload, case.guess, case.spec) == (b'{"id":"x"}', b'{"guess":1}', b'{"spec":1}')
    assert again.escalations.budget("triage") == BUDGET
    again.close()


def test_a_batch_that_fails_takes_the_settlement_back(spool: Spool) -> None:
    number = escalated(spool, "a")

    def settle_and_fail() -> None:
        with spool.batch():
            assert spool.escalations.settle(number, decision("x"), "answered")
            raise TransientError("disk.full", "later")

    with pytest.raises(TransientError):
        settle_and_fail()
    assert sent(spool) == []
    assert spool.escalations.find("triage", "id-a") == number


# ---- the file of the version before


def old_file(path: Path) -> Path:
    with sqlite3.connect(path) as db:
        db.executescript(VERSION_1.read_text())
    db.close()
    return path


def schema_of(path: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()
        version = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return [*rows, ("user_version", str(version))]


def test_a_file_of_version_1_is_upgraded_in_place_and_keeps_everything(tmp_path: Path) -> None:
    spool = Spool(old_file(tmp_path / "spool.sqlite"), SpoolSettings())
    counts = spool.counts()
    assert (counts.inbox, counts.outbox, counts.dead_letters, counts.escalations_pending) == (1, 1, 1, 0)
    assert counts.dropped == {"event.duplicate": 3}
    assert spool.accept("triage", "answered", b"{}", "normal", 1) is Duplicate
    event = spool.next_event()
    assert event is not None
    assert spool.escalations.begin(event.inbox_id, new("waits"), BUDGET, bounds=ROOMY) is Begun.BEGUN
    assert spool.counts().escalations_pending == 1
    spool.close()
    Spool(tmp_path / "fresh.sqlite", SpoolSettings()).close()
    assert schema_of(tmp_path / "spool.sqlite") == schema_of(tmp_path / "fresh.sqlite")


def test_two_processes_may_upgrade_one_file_at_the_same_time(tmp_path: Path) -> None:
    path = old_file(tmp_path / "spool.sqlite")
    script = (
        "import sys; from pathlib import Path; from edge_agent.settings import SpoolSettings;"
        "from edge_agent.uplink.spool import Spool; sys.stdin.readline();"
        f"Spool(Path({str(path)!r}), SpoolSettings(), is_owner=False).close()"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    for one in both:
        assert one.stdin is not None
        one.stdin.write(b"\n")
        one.stdin.close()
    assert [one.wait(30) for one in both] == [0, 0]
    assert schema_of(path)[-1] == ("user_version", str(SCHEMA_VERSION))


@pytest.mark.needs("strace")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_at_any_sync_of_the_upgrade_leaves_a_file_that_upgrades_again(tmp_path: Path, number: int) -> None:
    path = old_file(tmp_path / "spool.sqlite")
    script = (
        "from pathlib import Path; from edge_agent.settings import SpoolSettings;"
        f"from edge_agent.uplink.spool import Spool; Spool(Path({str(path)!r}), SpoolSettings())"
    )
    inject = f"inject=fsync,fdatasync:signal=SIGKILL:when={number}"
    subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "-e", inject, sys.executable, "-c", script], cwd=ROOT, check=False
    )
    spool = Spool(path, SpoolSettings())
    assert (spool.counts().inbox, spool.counts().outbox, spool.counts().dead_letters) == (1, 1, 1)
    spool.close()
    assert schema_of(path)[-1] == ("user_version", str(SCHEMA_VERSION))


def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = old_file(tmp_path / "spool.sqlite")
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    before = schema_of(path)
    with pytest.raises(PermanentError) as caught:
        Spool(path, SpoolSettings())
    assert caught.value.code == "spool.newer_schema"
    assert schema_of(path) == before


# ---- SIGKILL

LIFE = """
import sys
from pathlib import Path
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import BudgetRow, NewEscalation, OutboundMessage
from edge_agent.uplink.spool import Spool
spool = Spool(Path(sys.argv[1]), SpoolSettings())
spool.accept("triage", "a", b"{}", "normal", 1)
event = spool.next_event()
if event is not None:
    new = NewEscalation("id-a", "mqtt", b"{}", b"{}", "boot", 0, 1000)
    question = OutboundMessage("q", b"question", klass="alarm")
    spool.escalations.begin(event.inbox_id, new, BudgetRow(1.0, "b", 0), bounds=(9, 9999), request=question)
for row in spool.escalations.waiting():
    spool.escalations.note_attempt(row.escalation_id)
    spool.escalations.settle(row.escalation_id, OutboundMessage("d", b"decision"), "answered")
"""


@pytest.mark.needs("strace")
@pytest.mark.parametrize("number", range(1, 9))
def test_a_kill_at_any_sync_leaves_the_event_in_one_place_and_the_next_life_ends_it_once(
    tmp_path: Path, number: int
) -> None:
    path = tmp_path / "spool.sqlite"
    life = [sys.executable, "-c", LIFE, str(path)]
    inject = f"inject=fsync,fdatasync:signal=SIGKILL:when={number}"
    subprocess.run(["strace", "-f", "-o", "/dev/null", "-e", inject, *life], cwd=ROOT, check=False)
    if path.exists():
        spool = Spool(path, SpoolSettings())
        counts, messages = spool.counts(), sent(spool)
        places = (counts.inbox, counts.escalations_pending, messages.count("decision"))
        assert sum(places) <= 1, "nothing is promised before the first commit"
        assert messages.count("question") == counts.escalations_pending, "the question comes and goes with it"
        spool.close()
    subprocess.run(life, cwd=ROOT, check=True)
    spool = Spool(path, SpoolSettings())
    assert sent(spool) == ["decision"]
    counts = spool.counts()
    assert (counts.inbox, counts.escalations_pending, counts.escalations) == (0, 0, {"answered": 1})
    spool.close()


def test_sigkill_at_random_moments_leaves_every_escalated_event_in_one_place_and_answers_none_twice(
    tmp_path: Path,
) -> None:
    path = tmp_path / "spool.sqlite"
    promised: list[tuple[str, str]] = []
    for lines_wanted in (30, 75, 51):
        child = subprocess.Popen([sys.executable, str(CHILD), str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(lines_wanted)]
        child.kill()
        output, _ = child.communicate()
        lines += output.split("\n")[:-1]
        promised += [(word, event_id) for word, event_id in (line.split() for line in lines)]
    accepted = {event_id for word, event_id in promised if word == "accepted"}
    settled = {event_id for word, event_id in promised if word == "settled"}
    begun = {event_id for word, event_id in promised if word == "begun"}
    assert len(settled) > 10
    spool = Spool(path, SpoolSettings())
    out = Counter(queued.message.payload.decode() for queued in spool.pending(1_000_000))
    waiting = set()
    while (event := spool.next_event()) is not None:
        waiting.add(event.event_id)
    with sqlite3.connect(path) as db:
        asked = {row[0] for row in db.execute("SELECT event_id FROM escalations")}
    db.close()
    assert max(out.values()) == 1
    assert accepted <= out.keys() | waiting | asked
    assert not out.keys() & waiting
    assert not out.keys() & asked
    assert not waiting & asked
    assert settled <= out.keys()
    assert begun <= out.keys() | asked
    assert spool.counts().escalations_pending == len(asked)
    for event_id in accepted:
        assert spool.accept("triage", event_id, b"{}", "normal", 1) is Duplicate
    spool.close()
