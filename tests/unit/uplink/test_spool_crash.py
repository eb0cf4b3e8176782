"""What was promised before a crash is kept after it: SIGKILL at any moment, the order of fsyncs, a full disk."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import Duplicate, OutboundMessage
from edge_agent.uplink.spool import Spool

CHILD = Path(__file__).with_name("spool_child.py")
ROOT = Path(__file__).parents[3]


def run_until_killed(path: Path, first: int, lines_wanted: int) -> list[tuple[str, str]]:
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(path), str(first)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "open\n"
        lines = [child.stdout.readline() for _ in range(lines_wanted)]
    finally:
        # While it is in the middle of something: it has not stopped at the last line that was read.
        child.kill()
    output, _ = child.communicate()
    # The last line may be cut; a promise only half said is none.
    lines += output.split("\n")[:-1]
    return [(word, event_id) for word, event_id in (line.split() for line in lines)]


def test_sigkill_at_random_moments_loses_no_accepted_event_and_answers_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    rng = random.Random(1)
    promised: list[tuple[str, str]] = []
    for _ in range(4):
        promised += run_until_killed(path, len(promised), rng.randint(20, 80))
    accepted = {event_id for word, event_id in promised if word == "accepted"}
    answered = {event_id for word, event_id in promised if word == "answered"}
    assert len(accepted) > 20
    spool = Spool(path, SpoolSettings())
    sent = Counter(m.message.payload.decode() for m in spool.pending(1_000_000))
    waiting: set[str] = set()
    while (event := spool.next_event()) is not None:
        waiting.add(event.event_id)
    assert max(sent.values()) == 1
    assert answered <= sent.keys()
    assert accepted <= sent.keys() | waiting
    assert not sent.keys() & waiting
    for event_id in accepted:
        assert spool.accept("triage", event_id, b"{}", "normal", 1) is Duplicate
    spool.close()


@pytest.mark.needs("strace")
def test_the_log_is_synced_before_an_event_counts_as_accepted(tmp_path: Path) -> None:
    # SIGKILL leaves the page cache alone, a power cut does not: so the order of the system calls is checked too.
    trace = tmp_path / "trace"
    path = tmp_path / "spool.sqlite"
    script = (
        "import os, sys; from pathlib import Path; from edge_agent.settings import SpoolSettings;"
        "from edge_agent.uplink.spool import Spool; from edge_agent.uplink.records import OutboundMessage;"
        f"s = Spool(Path({str(path)!r}), SpoolSettings()); os.write(1, b'OPENED');"
        "s.accept('t', 'a', b'{}', 'normal', 1); os.write(1, b'ACCEPTED');"
        "s.complete(s.next_event().inbox_id, [OutboundMessage('x', b'y')]); os.write(1, b'ANSWERED')"
    )
    subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-o",
            str(trace),
            "-e",
            "trace=write,pwrite64,fsync,fdatasync",
            sys.executable,
            "-c",
            script,
        ],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    lines = trace.read_text().splitlines()
    marks = {
        name: next(i for i, line in enumerate(lines) if f'"{name}"' in line)
        for name in ("OPENED", "ACCEPTED", "ANSWERED")
    }
    is_sync = re.compile(r"(fsync|fdatasync)\(\d+<(.*)>\)\s+= 0")
    synced = [(i, m.group(2)) for i, line in enumerate(lines) if (m := is_sync.search(line))]
    # The directory entry of the new file is durable before anything is promised.
    assert any(name == str(tmp_path) and i < marks["OPENED"] for i, name in synced)
    for before, after in (("OPENED", "ACCEPTED"), ("ACCEPTED", "ANSWERED")):
        writes = [
            i
            for i, line in enumerate(lines)
            if "pwrite64(" in line and f"{path}-wal>" in line and marks[before] < i < marks[after]
        ]
        syncs = [i for i, name in synced if name == f"{path}-wal" and marks[before] < i < marks[after]]
        assert writes, f"nothing was written between {before} and {after}"
        assert syncs, f"nothing was synced between {before} and {after}"
        assert max(syncs) > max(writes), f"the last write before {after} was not synced"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)], check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.needs("root", "mount")
def test_a_full_disk_refuses_events_and_recovers_when_space_returns(small_disk: Path) -> None:
    spool = Spool(small_disk / "spool.sqlite", SpoolSettings())
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 100_000)
    accepted: list[str] = []
    error: TransientError | None = None
    for number in range(10_000):
        try:
            spool.accept("triage", str(number), b"x" * 1000, "normal", 1)
        except TransientError as caught:
            error = caught
            break
        accepted.append(str(number))
    assert error is not None
    assert error.code == "disk.full"
    assert len(accepted) > 10
    spool.count("message.unknown_topic")
    assert spool.counts().dropped == {"message.unknown_topic": 1}
    # Reading goes on, nothing accepted is gone.
    assert spool.counts().inbox == len(accepted)
    event = spool.next_event()
    assert event is not None
    ballast.unlink()
    assert spool.complete(event.inbox_id, [OutboundMessage("out", b"answer")])
    spool.accept("triage", "after", b"{}", "normal", 1)
    assert spool.counts().inbox == len(accepted)
    spool.close()
    again = Spool(small_disk / "spool.sqlite", SpoolSettings())
    assert again.counts().inbox == len(accepted)
    again.close()


@pytest.mark.needs("root", "mount")
def test_a_batch_that_meets_a_full_disk_is_taken_back_as_a_whole(small_disk: Path) -> None:
    spool = Spool(small_disk / "spool.sqlite", SpoolSettings())
    returned: list[int] = []

    def overfill() -> None:
        with spool.batch():
            for number in range(2000):
                spool.accept("triage", str(number), b"x" * 1000, "normal", 1)
                returned.append(number)

    with pytest.raises(TransientError) as caught:
        overfill()
    assert caught.value.code == "disk.full"
    assert spool.counts().inbox == 0
    assert spool.accept("triage", "0", b"{}", "normal", 1) is not Duplicate
    spool.close()


@pytest.mark.needs("root", "mount")
def test_a_batch_is_lost_as_a_whole_also_when_the_caller_swallows_the_error(small_disk: Path) -> None:
    spool = Spool(small_disk / "spool.sqlite", SpoolSettings())

    def overfill() -> None:
        with spool.batch():
            for number in range(2000):
                with contextlib.suppress(TransientError):
                    spool.accept("triage", str(number), b"x" * 1000, "normal", 1)

    with pytest.raises(TransientError) as caught:
        overfill()
    assert caught.value.code == "disk.full"
    assert spool.counts().inbox == 0
    spool.close()


@pytest.mark.needs("root", "mount")
def test_no_spool_on_a_full_disk_is_a_transient_error(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * (512 * 1024 - 4096))
    with pytest.raises(TransientError) as caught:
        Spool(small_disk / "spool.sqlite", SpoolSettings())
    assert caught.value.code == "disk.full"
    (small_disk / "ballast").unlink()
    spool = Spool(small_disk / "spool.sqlite", SpoolSettings())
    assert spool.counts().inbox == 0
    spool.close()
