"""What the commands say to wrong input: one line with a code, exit status 1 or 2, and never a traceback."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_agent.__main__ import main
from edge_agent.errors import RefusedError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.spool import Spool

BEYOND_SQLITE = "99999999999999999999"


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    spool = Spool(tmp_path / "spool.sqlite", SpoolSettings())
    hostile = RefusedError("task.unknown", "no \x1b]0;title\x07 task\nok    broker \u202e")
    spool.bury(None, hostile, task="a\x1b[2Jb", payload=b"{}")
    spool.close()
    return tmp_path


def edge_agent(*arguments: str, **streams: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edge_agent", *arguments]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]


def test_a_dead_letter_cannot_command_the_terminal_that_lists_it(
    state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dead-letters", "list", "--state_dir", str(state_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "task.unknown" in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["dead-letters", "retry", BEYOND_SQLITE],
        ["dead-letters", "list", "--limit", BEYOND_SQLITE],
        ["dead-letters", "list", "--limit", "-1"],
        ["decide", "--bundle", "x", "--threads", "99999"],
        ["decide", "--bundle", "x", "--threads", "many"],
        ["decide", "--bundle", "x", "--deadline-s", "nan"],
        ["decide", "--bundle", "x", "--deadline-s", "0"],
        ["bench", "--bundle", "x", "--seconds", "inf"],
    ],
    ids=" ".join,
)
def test_an_impossible_number_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def refusal(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], *, status: int = 1) -> str:
    """The one line that a failing command prints."""
    assert main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_listing_leaves_a_corrupt_spool_to_the_daemon_that_may_have_it_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spool.sqlite").write_bytes(b"garbage" * 100)
    assert "spool.corrupt" in refusal(["dead-letters", "list", "--state_dir", str(tmp_path)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["spool.sqlite"]


def test_a_state_dir_that_is_a_file_holds_no_spool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    line = refusal(["dead-letters", "list", "--state_dir", str(tmp_path / "file")], capsys)
    assert "deadletter.no_spool" in line


def test_a_settings_file_nested_without_end_is_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    assert "settings.unreadable" in refusal(["run", "--config", str(tmp_path / "deep.toml")], capsys)


@pytest.mark.parametrize("topic", ["a/#", "{site}/+/x", "$SYS/x", "a\tb"])
def test_a_decision_topic_that_nobody_may_publish_on_is_refused_at_the_start(
    topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "node.decision_topic" in refusal(["run", f"--node.decision_topic={topic}"], capsys, status=2)


def test_a_second_daemon_on_the_same_state_directory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        done = edge_agent("run", "--state_dir", str(tmp_path), stdout=subprocess.DEVNULL)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert b"spool.in_use" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_doctor_leaves_no_trace_in_a_state_dir_that_is_the_daemons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    assert main(["doctor", "--state_dir", str(absent), "--mqtt.port", "1"]) == 1
    assert "bundle.missing" in capsys.readouterr().out
    assert not absent.exists()


def test_a_full_disk_under_the_output_is_one_line(state_dir: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = edge_agent("dead-letters", "list", "--state_dir", str(state_dir), stdout=full.fileno())
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert b"disk.full" in done.stderr


def test_a_reader_that_has_gone_away_ends_the_listing_without_a_word(state_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = edge_agent("dead-letters", "list", "--state_dir", str(state_dir), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.needs("root")
def test_a_spool_that_this_user_may_not_read_is_one_line(state_dir: Path) -> None:
    state_dir.chmod(0o700)
    command = ["setpriv", "--reuid", "12345", "--clear-groups", sys.executable, "-m", "edge_agent"]
    done = subprocess.run(
        [*command, "dead-letters", "list", "--state_dir", str(state_dir)], check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert b"disk.permission" in done.stderr
