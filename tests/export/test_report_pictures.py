"""The pictures of a report card show the report's own numbers, and none where it has none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from export.card.charts import WIDTH, Axis, Bar, Group, bars, round_step, short_count
from export.card.markup import bytes_text, coordinate, duration_text, element
from export.card.report import report_json_bytes
from tests.fakes.report_cards import (
    SVG,
    captions,
    figures,
    page,
    picture,
    plain,
    report,
    table_rows,
    words,
)

# --- the numbers of the pictures are the numbers of the report ------------------------------------


def widths(svg: ET.Element) -> list[float]:
    """Of the bars that stand for a number: they say which."""
    return [float(node.attrib["width"]) for node in svg.iter(f"{SVG}rect") if node.find(f"{SVG}title") is not None]


def test_bars_are_as_long_as_their_numbers() -> None:
    sizes = report()["size_bytes"]
    svg = picture(page(report()), "Size by part")
    drawn = sorted(widths(svg), reverse=True)
    ranked = sorted(sizes.values(), reverse=True)
    assert drawn[0] == WIDTH
    assert drawn[1] / drawn[0] == pytest.approx(ranked[1] / ranked[0], abs=0.001)
    assert drawn[2] == 1.0  # 24 bytes are something, not nothing
    assert "1.69 MB · 73 %" in words(svg)


def test_equal_errors_are_equal_bars_in_every_group() -> None:
    found = figures(accuracy={"kind": 0.95, "urgent": 0.95}, exact=0.8)
    svg = picture(page(report(quality={"sort": {"int4": found, "fp32": found}})), "Wrong answers")
    drawn = widths(svg)
    assert len(set(drawn[:4])) == 1
    assert drawn[4] / drawn[0] == pytest.approx(4, rel=0.01)


def test_no_bar_runs_under_its_number() -> None:
    svg = picture(page(report()), "Wrong answers")
    ends = [float(n.attrib["d"].rpartition("H")[2]) for n in svg.iter(f"{SVG}path") if n.attrib["class"] == "whisker"]
    # "16.0 %" in bold type of 12 units is about 40 wide and ends at the right edge.
    assert max(*ends, *widths(svg)) <= WIDTH - 44


def test_errors_are_told_as_they_were_measured() -> None:
    said = words(picture(page(report()), "Wrong answers"))
    assert said.count("5.0 %") == 2  # kind, in both precisions
    assert said.count("11.5 %") == 2  # urgent
    assert {"16.0 %", "14.0 %"} <= set(said)


def test_phases_are_told_as_they_were_measured() -> None:
    root = page(report())
    assert {"312 ms", "21.3 ms"} <= set(words(picture(root, "Once, at start")))
    assert {"8.31 ms", "1.23 ms", "13.1 ms", "19.8 ms"} <= set(words(picture(root, "For every event")))
    assert "Measured on aarch64, Raspberry Pi 5 with 2 thread(s)" in plain(root)


def dots(svg: ET.Element) -> list[tuple[float, float, float]]:
    return [
        (float(n.attrib["cx"]), float(n.attrib["cy"]), float(n.attrib["r"]))
        for n in svg.iter(f"{SVG}circle")
        if n.attrib["class"].startswith("dot")
    ]


def test_point_of_a_bin_lies_where_its_confidence_and_accuracy_are() -> None:
    svg = picture(page(report()), "kind: calibration error 0.0123, 200 answers, temperature 1.3")
    diagonal = next(n.attrib for n in svg.iter(f"{SVG}line") if n.attrib["class"] == "diagonal")
    x0, y0, x1, y1 = (float(diagonal[end]) for end in ("x1", "y1", "x2", "y2"))
    for (cx, cy, _), b in zip(dots(svg), report()["quality"]["sort"]["int4"]["reliability"]["kind"], strict=True):
        assert (cx - x0) / (x1 - x0) == pytest.approx(b["confidence"], abs=0.002)
        assert (cy - y0) / (y1 - y0) == pytest.approx(b["accuracy"], abs=0.002)
    assert {"37", "163"} <= set(words(svg))
    few, many = (radius for _, _, radius in dots(svg))
    assert few < many


def test_front_is_numbered_and_its_knee_ringed() -> None:
    svg = picture(page(report()), "Size against loss")
    assert {"1", "2"} <= set(words(svg))
    ring = next(n.attrib for n in svg.iter(f"{SVG}circle") if n.attrib["class"] == "ring")
    knee = next(n.attrib for n in svg.iter(f"{SVG}circle") if "2 int4-rtn-32" in "".join(n.itertext()))
    assert (ring["cx"], ring["cy"]) == (knee["cx"], knee["cy"])
    rows = table_rows(page(report()))
    assert ["int4-rtn-32", "2 knee", "3,190,000", "0.004"] in [row[:4] for row in rows]
    assert ["int4-hqq-32", "", "3,300,000", "0.005"] in [row[:4] for row in rows]


def test_a_run_is_told_with_its_emulator_and_its_misses() -> None:
    assert ["cpu-arm64", "emulated", "CPU on aarch64, emulated by qemu", "23 of 24"] in table_rows(page(report()))


def test_what_was_done_to_the_model_is_told() -> None:
    root = page(report())
    assert "99.74 % of the tokens of text that was held out can be chosen." in plain(root)
    assert {"256", "3", "61", "1,728"} <= set(words(picture(root, "Rows of the head")))
    told = table_rows(root)
    assert ["layer 2", "taken out", "0.034", "0.1"] in told
    assert ["right", "81.00 %", "93.70 %"] in told
    assert ["right", "10.00 %", "91.23 %"] in told
    headings = [plain(node) for node in root.iter("h2")]
    assert {"Before the export: layers taken out", "Before the export: distilled"} <= set(headings)


def test_every_picture_has_words_for_those_who_cannot_see_it() -> None:
    root = page(report())
    drawn = [svg for f in root.iter("figure") for svg in f.iter(f"{SVG}svg")]
    assert len(drawn) >= 10
    for svg in drawn:
        assert svg.attrib["role"] == "img"
        assert [child.tag for child in svg][:2] == [f"{SVG}title", f"{SVG}desc"]
        assert all("".join(child.itertext()).strip() for child in svg[:2])
    assert all(any(True for _ in f.iter("table")) for f in root.iter("figure"))


# --- numbers that are none ------------------------------------------------------------------------

BROKEN: tuple[Any, ...] = (math.nan, math.inf, -math.inf, None, "many", True, [], 10**400)


def damage(value: Any, broken: Any) -> Any:
    """Every number of a report replaced."""
    if isinstance(value, dict):
        return {key: damage(item, broken) for key, item in value.items()}
    if isinstance(value, list):
        return [damage(item, broken) for item in value]
    return broken if isinstance(value, int | float) and not isinstance(value, bool) else value


def assert_drawable(root: ET.Element) -> None:
    for node in root.iter():
        if not node.tag.startswith(SVG):
            continue
        for name, value in node.attrib.items():
            assert not re.search(r"nan|inf|none", value, re.IGNORECASE), (node.tag, name, value)
            if name in {"x", "y", "cx", "cy", "r", "width", "height", "x1", "x2", "y1", "y2"}:
                assert math.isfinite(float(value))
            if name in {"r", "width", "height"}:
                assert float(value) >= 0


@pytest.mark.parametrize("broken", BROKEN, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    "key", ["quality", "latency", "sweep", "sensitivity", "size_bytes", "parity", "vocabulary", "lineage"]
)
def test_number_that_is_none_breaks_no_picture(key: str, broken: Any) -> None:
    assert_drawable(page(report(**{key: damage(report()[key], broken)})))


@pytest.mark.parametrize("value", [0, 0.0, 1e-300, 1e300, -1.0])
@pytest.mark.parametrize("key", ["quality", "latency", "sweep", "sensitivity", "size_bytes", "vocabulary"])
def test_extreme_numbers_stay_inside_the_picture(key: str, value: float) -> None:
    root = page(report(**{key: damage(report()[key], value)}))
    assert_drawable(root)
    assert all(width <= WIDTH for svg in root.iter(f"{SVG}svg") for width in widths(svg))


def test_missing_keys_leave_gaps_not_errors() -> None:
    root = page(
        report(quality={"sort": {"int4": {"exact": 0.5}}}, sweep=[{"label": "x", "bytes": 5}], latency={"x": 1})
    )
    assert_drawable(root)
    assert "Wrong answers by field and precision" in captions(root)


def test_number_that_is_none_is_null_in_the_file() -> None:
    assert json.loads(report_json_bytes({"a": [math.nan, {"b": math.inf}], "c": 1.5})) == {
        "a": [None, {"b": None}],
        "c": 1.5,
    }


def test_picture_refuses_a_length_that_is_none() -> None:
    with pytest.raises(ValueError, match="no coordinate"):
        coordinate(math.nan)
    assert coordinate(-0.01) == "0"


def test_text_of_bars_does_not_leave_the_picture() -> None:
    long = bars("long", [Group("w" * 300, (Bar("", 1.0, "1.00 MB"),))], legend=["v" * 300, "u"])
    heading = next(w for w in words(ET.fromstring(long)) if w.startswith("w"))
    assert heading.endswith("…")
    assert len(heading) < 60
    assert "w" * 300 in long  # whole, for whoever points at it


# --- floors -----------------------------------------------------------------------------------------------------------


def test_each_floor_has_a_row_with_what_was_asked_and_what_it_lets_through() -> None:
    rows = table_rows(page(report()))
    assert [
        "kind (over urgent, kind)", "1.00 %", "0.8125", "80.0 %", "0.63 % (0.02 % to 3.43 %)", "other events: kept"
    ] in rows  # fmt: skip
    assert any(row[:3] == ["urgent", "2.00 %", "none: always unsure"] and "nothing passes" in row[-1] for row in rows)


def test_floors_that_nobody_measured_are_told_from_the_events_that_they_were_chosen_on() -> None:
    for quality in ({}, {"sort": {"int4": figures(floors={})}}):
        rows = table_rows(page(report(quality=quality)))
        assert ["kind", "1.00 %", "0.8125", "412 of 500", "1 of 412", "events that it was chosen on"] in rows
        assert any(row[0] == "urgent" and "1,234 labelled events" in row[-1] for row in rows)


def test_a_floor_is_ringed_in_the_plot_where_its_coverage_and_errors_are() -> None:
    svg = picture(page(report()), "each field: errors against coverage")
    (ring,) = [node for node in svg.iter(f"{SVG}circle") if "line" in node.attrib["class"]]
    assert "floor 0.8125, 80.0 % pass, 0.63 % of them wrong" in plain(ring)
    (dot,) = [node for node in svg.iter(f"{SVG}circle") if "dot" in node.attrib["class"]]
    # The only answer of the line lies at full coverage: the ring stands left of it, and lower, where errors are fewer.
    assert float(ring.attrib["cx"]) < float(dot.attrib["cx"])
    assert float(ring.attrib["cy"]) > float(dot.attrib["cy"])


def test_without_a_threshold_the_card_says_nothing_of_floors() -> None:
    without = report(quality={"sort": {"int4": figures(floors={})}})
    del without["floors"]
    assert [plain(node) for node in page(report()).iter("strong")] == ["Floors."]
    assert not list(page(without).iter("strong"))


# --- words for numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "value", "written"),
    [
        (bytes_text, 0, "0 B"),
        (bytes_text, 24, "24 B"),
        (bytes_text, 999_499, "999 kB"),
        (bytes_text, 999_600, "1.00 MB"),
        (bytes_text, 3_454_583, "3.45 MB"),
        (bytes_text, 92_000_000, "92.0 MB"),
        (bytes_text, 7e12, "7000 GB"),
        (duration_text, 0.0421, "0.04 ms"),
        (duration_text, 8.314, "8.31 ms"),
        (duration_text, 312.4, "312 ms"),
        (duration_text, 1299, "1.30 s"),
        (short_count, 999, "999"),
        (short_count, 1000, "1k"),
        (short_count, 1234, "1.2k"),
        (short_count, 31_400, "31k"),
        (short_count, 2_000_000, "2M"),
        (round_step, 0.19, "0.2"),
        (round_step, 0.21, "0.5"),
        (round_step, 7.0, "10.0"),
    ],
)
def test_numbers_are_written_for_people(write: Callable[[Any], Any], value: float, written: str) -> None:
    assert str(write(value)).replace("\N{NO-BREAK SPACE}", " ") == written


@pytest.mark.parametrize(
    ("low", "high", "is_log"), [(0, 1, False), (2.5e6, 3.6e6, False), (1e-6, 5, True), (0.9, 40, True)]
)
def test_axis_has_a_few_ticks_inside(low: float, high: float, is_log: bool) -> None:  # noqa: FBT001 - a column
    axis = Axis("x", low, high, str, is_log=is_log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)
    places = [axis.place(tick) for tick in ticks]
    assert places == sorted(places)


def test_attribute_cannot_be_left_by_a_quote() -> None:
    assert element("rect", class_='a" onclick="b', x=None) == '<rect class="a&quot; onclick=&quot;b" />'
