"""What `make bench` says and when it fails: the verdict of a figure, the table, and the rule against falling back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.figures import Figure, Target, fallen_back, from_samples, table
from tests.bench.interleaved import Speeds, paired_ratios
from tests.bench.page import FIGURES, PAGE, as_json, committed_figures, machine, write_page
from tests.bench.reference_figures import loss_figure

AT_MOST = Target(1.02, "lower")
AT_LEAST = Target(2.2, "higher")
MACHINE: dict[str, Any] = {"cores": 2}


def committed(*figures: Figure) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(as_json(figures, MACHINE))["figures"]
    return found


def decode(value: float | None, unit: str = "x") -> Figure:
    return Figure("shape.decode_ratio", "decode", value, unit, AT_LEAST, note="" if value else "no compiler")


def size(value: float | None) -> Figure:
    return Figure("shape.size_ratio", "size", value, "x", AT_MOST)


@pytest.mark.parametrize(("value", "met"), [(1.02, True), (1.03, False), (0.5, True), (None, False)])
def test_a_size_meets_its_target_from_below(value: float | None, *, met: bool) -> None:
    assert size(value).met is met


@pytest.mark.parametrize(("value", "met"), [(2.2, True), (2.19, False), (None, False)])
def test_a_speed_meets_its_target_from_above(value: float | None, *, met: bool) -> None:
    assert decode(value).met is met


def test_a_figure_without_a_target_is_neither_met_nor_missed() -> None:
    figure = Figure("shape.gguf_mb", "file", 77.2, "MB")
    assert figure.met is None
    assert table([figure])[-1] == "| file | 77.2 MB |  |  |"


def test_a_figure_that_was_not_measured_says_why_and_counts_as_missed() -> None:
    assert table([decode(None)])[-1] == "| decode | not measured: no compiler | >= 2.2 x | no |"


def test_the_table_shows_the_spread_of_the_rounds() -> None:
    value, spread = from_samples([2.3, 2.5, 2.1])
    row = table([Figure("shape.decode_ratio", "decode", value, "x", AT_LEAST, spread)])[-1]
    assert row == "| decode | 2.30 x (2.10 to 2.50) | >= 2.2 x | yes |"


@pytest.mark.parametrize(("now", "fell"), [(2.0, False), (1.88, False), (1.86, True), (5.0, False)])
def test_a_speed_ratio_may_fall_by_fifteen_percent_and_no_further(now: float, *, fell: bool) -> None:
    assert bool(fallen_back(committed(decode(2.2)), [decode(now)])) is fell


@pytest.mark.parametrize(("now", "fell"), [(1.0, False), (1.14, False), (1.16, True)])
def test_a_size_ratio_may_grow_by_fifteen_percent_and_no_further(now: float, *, fell: bool) -> None:
    assert bool(fallen_back(committed(size(1.0)), [size(now)])) is fell


def test_a_ratio_that_can_no_longer_be_measured_has_fallen_back() -> None:
    (sentence,) = fallen_back(committed(decode(2.4)), [decode(None)])
    assert "no compiler" in sentence


def test_a_ratio_that_was_never_reached_cannot_fall_back() -> None:
    assert not fallen_back(committed(decode(2.0)), [decode(0.1)])


def test_another_machine_may_be_slower() -> None:
    slow = Figure("shape.export_seconds", "export", 80.0, "s", Target(90, "lower"))
    slower = Figure("shape.export_seconds", "export", 500.0, "s", Target(90, "lower"))
    assert not fallen_back(committed(slow), [slower])


def test_a_shape_that_was_not_asked_for_is_not_missed() -> None:
    assert not fallen_back(committed(decode(2.4), size(1.0)), [])


def test_a_first_run_has_nothing_to_fall_back_from(tmp_path: Path) -> None:
    assert committed_figures(tmp_path / "absent.json") == {}


def test_the_figures_survive_the_page(tmp_path: Path) -> None:
    write_page([decode(2.4)], machine(), tmp_path)
    assert committed_figures(tmp_path / FIGURES)["shape.decode_ratio"]["met"] is True


def test_the_page_names_the_machine_and_every_figure_and_note(tmp_path: Path) -> None:
    noted = Figure("shape.gguf_mb", "file", 77.2, "MB", note="its own quantiser agrees")
    found = machine()
    write_page([decode(2.4), noted], found, tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert "| decode | 2.40 x | >= 2.2 x | yes |" in page
    assert "- file: its own quantiser agrees" in page
    assert f"One run on {found['cores']} cores" in page
    assert found["libraries"]["onnxruntime"] in page
    assert "$cores" not in page


def test_a_field_that_gained_does_not_hide_the_one_that_lost() -> None:
    figure = loss_figure("k", "loss", {"severity": 0.923, "category": 0.978}, {"severity": 0.927, "category": 0.972})
    assert figure.value == pytest.approx(0.6)
    assert figure.met is False
    assert figure.note == "lost by field: severity -0.4, category +0.6"


def test_a_slow_round_meets_both_engines_of_a_ratio() -> None:
    assert paired_ratios([100.0, 50.0], [40.0, 20.0]) == [2.5, 2.5]


def test_the_speed_of_a_round_is_its_median_pass_not_its_slowest() -> None:
    speeds = Speeds()
    times = {"prefill_ms": 320.0, "step_ms": [10.0, 10.0, 500.0]}
    speeds.add("a warning\n" + json.dumps({"depths": {"64": times}, "peak_rss_bytes": 7}) + "\n")
    assert speeds.decode_tok_per_s == {64: [100.0]}
    assert speeds.prefill_tok_per_s == {64: [200.0]}
    assert speeds.peak_rss_bytes == [7]
