"""Measuring a command: its memory with its children's, its failure with its own words, and nothing made twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.cache import cached, files_digest
from tests.bench.measured_run import CommandFailedError, run_measured

MB = 1 << 20
HOLD = (
    "import time; held = bytearray(120 << 20); held[::4096] = b'1' * len(held[::4096]); time.sleep(0.4); print('held')"
)


def test_memory_that_is_held_counts(tmp_path: Path) -> None:
    run = run_measured([sys.executable, "-c", HOLD], cwd=tmp_path)
    assert 120 * MB < run.peak_rss_bytes < 220 * MB
    assert run.seconds >= 0.4
    assert run.stdout == "held\n"


def test_memory_of_a_child_counts_beside_its_parents(tmp_path: Path) -> None:
    both = (
        "import subprocess, sys; held = bytearray(80 << 20); held[::4096] = b'1' * len(held[::4096])\n"
        f"subprocess.run([sys.executable, '-c', {HOLD!r}])"
    )
    run = run_measured([sys.executable, "-c", both], cwd=tmp_path)
    assert run.peak_rss_bytes > 200 * MB


def test_a_command_that_fails_is_told_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match="ended with 3: no such shape"):
        run_measured(
            [sys.executable, "-c", "import sys; print('no such shape', file=sys.stderr); sys.exit(3)"], cwd=tmp_path
        )


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(CommandFailedError, match="ended with -9"):
        run_measured([sys.executable, "-c", hang], cwd=tmp_path, timeout_s=0.5)


def test_the_same_content_is_made_once_and_other_content_anew(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    first = cached("peer", {"weights": "a"}, make, tmp_path)
    assert cached("peer", {"weights": "a"}, make, tmp_path) == first
    second = cached("peer", {"weights": "b"}, make, tmp_path)
    assert (second / "file").read_text() == "2"
    assert not first.exists()
    assert len(made) == 2


def test_what_failed_half_way_is_not_taken_for_made(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise CommandFailedError("disk full")

    def make(folder: Path) -> None:
        (folder / "whole").touch()

    with pytest.raises(CommandFailedError):
        cached("peer", {}, fail, tmp_path)
    assert [file.name for file in cached("peer", {}, make, tmp_path).iterdir()] == ["whole"]


def test_a_changed_byte_or_name_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "weights"
    file.write_bytes(b"a")
    before = files_digest(tmp_path / "folder")
    file.write_bytes(b"b")
    assert files_digest(tmp_path / "folder") != before
    file.write_bytes(b"a")
    file.rename(tmp_path / "folder" / "other")
    assert files_digest(tmp_path / "folder") != before
