"""What `bench` says to events and places that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent.__main__ import main
from edge_agent.runtime.thread_sweep import NEARLY_BEST, counts_for, usable_cores


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"text": "hot"}\nnot json', "event.not_json: line 2 of events.jsonl"),
        (b"\xff\xfe", "event.not_json: line 1"),
        (b"[" * 100_000, "event.not_json: line 1"),
        (b'{"event": 5}', "event.not_object: line 1"),
        (b"\n \n", "bench.no_events"),
    ],
    ids=["garbage", "binary", "nested without end", "no object", "blank"],
)
def test_a_line_that_is_no_event_is_named_and_nothing_is_measured(
    content: bytes, code: str, tmp_path: Path, reference_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.jsonl"
    events.write_bytes(content)
    assert main(["bench", "--bundle", str(reference_bundle), "--events", str(events)]) == 1
    said = capsys.readouterr()
    assert code in said.err
    assert (said.out, len(said.err.splitlines())) == ("", 1)


def test_figures_that_cannot_be_written_to_their_file_are_still_printed(
    tmp_path: Path, reference_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--bundle", str(reference_bundle), "--seconds", "0.1"]
    assert main([*arguments, "--json", str(tmp_path / "absent" / "b.json")]) == 1
    said = capsys.readouterr()
    assert "p95_ms" in said.out
    assert "disk.missing" in said.err


def test_a_sweep_prints_every_count_of_this_machine_and_what_an_installation_would_take(
    reference_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--bundle", str(reference_bundle), "--sweep-threads"]) == 0
    found = json.loads(capsys.readouterr().out)
    table = {row["threads"]: row["p50_ms"] for row in found["table"]}
    assert list(table) == list(counts_for(usable_cores()))
    assert table[found["threads"]] <= min(table.values()) * NEARLY_BEST
    assert all(p50 > min(table.values()) * NEARLY_BEST for n, p50 in table.items() if n < found["threads"])


def test_a_sweep_without_time_for_every_count_names_none(
    reference_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No worker starts in a millisecond.
    assert main(["bench", "--bundle", str(reference_bundle), "--sweep-threads", "--seconds", "0.001"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["threads"], found["table"]) == (None, [])
    assert found["default_threads"] >= 1
