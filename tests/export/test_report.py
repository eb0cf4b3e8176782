"""The report card: nothing on it is invented, hidden, fetched or run, whatever the report holds."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from onnx import ModelProto, TensorProto, helper

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import GoldenExample, parse_task
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.runtime.bench import bench
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.card.charts import WIDTH, Axis, Bar, Group, bars, round_step, short_count
from export.card.markup import bytes_text, coordinate, duration_text, element, share_text, text
from export.card.report import HOW_TO, redrawn, report_html_bytes, report_json_bytes, size_by_part
from export.commands.report import add_report
from export.proof.evaluate import Outcome, evaluate, without_curves
from export.proof.reliability import bins, expected_calibration_error, risk_coverage, wilson_interval
from tests.export.conftest import TASK

REFERENCE = Path(__file__).parents[2] / "export" / "reference"
BUNDLE, QUALITY = REFERENCE / "bundle", REFERENCE / "quality.json"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></svg><iframe src='//evil.example'>",
    "a & b ]]> --> <!-- &lt;",
    "nul\x00 bell\x07 escape\x1b[31m",
    "lone \ud800 surrogate, \uffff, turned \u202e around",
    "x" * 400,
    "url(https://evil.example/a.png) @import",
)  # fmt: skip


def figures(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "rows": 200,
        "failed": 0,
        "accuracy": {"kind": 0.95, "urgent": 0.885},
        "exact": 0.84,
        "ece": {"kind": 0.0123, "urgent": 0.045},
        "answered": 0.9,
        "exact_when_answered": 0.91,
        "reliability": {
            "kind": [
                {"bin": 7, "count": 37, "confidence": 0.512, "accuracy": 0.486},
                {"bin": 14, "count": 163, "confidence": 0.981, "accuracy": 0.975},
            ],
            "urgent": [{"bin": 13, "count": 200, "confidence": 0.9, "accuracy": 0.885}],
        },
        "risk_coverage": {
            "decision": [
                {"coverage": 0.5, "confidence": 0.97, "wrong": 0.02},
                {"coverage": 1.0, "confidence": 0.4, "wrong": 0.16},
            ],
            "fields": {"kind": [{"coverage": 1.0, "confidence": 0.5, "wrong": 0.05}]},
        },
        "floors": {
            "kind": {
                "max_wrong": 0.01,
                "certainty": 0.95,
                "over": ["urgent", "kind"],
                "floor": 0.8125,
                "passed": 160,
                "wrong": 1,
                "coverage": 0.8,
                "wrong_share": 0.0063,
                "interval": [0.0002, 0.0343],
                "verdict": "kept",
            },
            "urgent": {
                "floor": None,
                "passed": 0,
                "wrong": 0,
                "coverage": 0.0,
                "wrong_share": None,
                "interval": None,
                "verdict": "nothing passes",
                "max_wrong": 0.02,
            },
        },
    }
    return {**made, **changes}


CHOSEN: dict[str, Any] = {
    "max_wrong": 0.01,
    "certainty": 0.95,
    "floor": 0.8125,
    "events": 500,
    "passed": 412,
    "wrong": 1,
}


def combination(label: str, size: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    row = {"method": "rtn", "block_size": 32, "symmetric": True, "int8_share": 0.0, "label": label, "bytes": size}
    speed = {"top1": 0.99, "perplexity_ratio": 1.01, "accuracy": None, "decode_tok_per_s": 810.5}
    return {**row, **speed, "kl_nats": loss, "on_front": False, "knee": False, **changes}


def report(**changes: Any) -> dict[str, Any]:
    """Everything that a report can hold."""
    made: dict[str, Any] = {
        "format": 1,
        "bundle": {"name": "tiny", "version": "1.2.0", "target": "cpu-x86_64"},
        "precision": "int4-rtn-32",
        "verification": "executed",
        "size_bytes": {"feed-forward": 1_689_600, "attention": 614_400, "other weights": 24},
        "parity": {"fp32_matches_transformers": True, "int4_against_fp32": {"mean_kl_nats": 0.0004, "positions": 352}},
        "quality": {"sort": {"int4": figures(), "fp32": figures(exact=0.86)}},
        "calibration": {"sort": {"kind": 1.3}},
        "floors": {"sort": {"kind": CHOSEN, "urgent": {**CHOSEN, "floor": None, "needed_events": 1234}}},
        "lines": {"sort": {"kind": 11}},
        "checkpoint": {"architecture": "llama", "parameters": 4_737_792, "sha256": "ab" * 32, "files": {}},
        "tools": {"onnx": "1.23.2"},
        "evidence": [{"target": "cpu-arm64", "word": "emulated", "provider": "CPUExecutionProvider",
                      "machine": "aarch64", "emulator": "qemu", "events": 24, "same": 23}],
        "latency": {"machine": "aarch64, Raspberry Pi 5", "threads": 2, "load_s": 0.312, "prefix_prefill_ms": 21.3,
                    "event_prefill_ms": 8.31, "decode_pass_ms": 1.231, "p50_ms": 13.1, "p95_ms": 19.8},
        "sweep": [combination("int4-rtn-128", 2_690_000, 0.02, on_front=True),
                  combination("int4-rtn-32", 3_190_000, 0.004, on_front=True, knee=True),
                  combination("int4-hqq-32", 3_300_000, 0.005)],
        "sensitivity": [{"layer": "layers.0.down", "kl_nats": 0.0071, "int8": True},
                        {"layer": "layers.1.down", "kl_nats": 0.0002, "int8": False}],
        "vocabulary": {"rows": 2048, "byte_tokens": 256, "control_tokens": 3, "answer_tokens": 61,
                       "domain_tokens": 1728, "dropped_tokens": 0,
                       "heldout": {"tokens": 5000, "reachable": 4987, "reachable_share": 0.9974,
                                   "tokens_with_bytes": 5031, "length_ratio": 1.0062}},
        "lineage": [{"format": 1, "parent": {"sha256": "cd" * 32, "parameters": 5_000_000}, "dropped": [2],
                     "kept": [0, 1],
                     "rounds": [{"dropped": 2, "layers": [{"layer": 1, "influence": 0.4, "kl_nats": 0.91},
                                                          {"layer": 2, "influence": 0.1, "kl_nats": 0.034}]}],
                     "recovery": {"steps": 400, "lessons": 9000, "before": {"right": 0.81, "loss_nats": 0.4},
                                  "after": {"right": 0.937, "loss_nats": 0.2, "kl_nats": None}}},
                    {"format": 1, "parent": {"sha256": "ef" * 32}, "shape": {"hidden_size": 128}, "rounds": [],
                     "training": {"steps": 900, "before": {"right": 0.1}, "after": {"right": 0.9123}}}],
    }  # fmt: skip
    return {**made, **changes}


BARE: dict[str, Any] = {"quality": {}, "calibration": {}, "size_bytes": {}, "parity": {}, "tools": {}}
OPTIONAL = ("floors", "lines", "evidence", "latency", "sweep", "sensitivity", "vocabulary", "lineage")


def bare() -> dict[str, Any]:
    """No more than a report must hold."""
    made = report(**BARE)
    for key in OPTIONAL:
        del made[key]
    return made


def page(found: Mapping[str, Any]) -> ET.Element:
    """The page as strict XML: what is not well-formed does not parse."""
    return ET.fromstring(report_html_bytes(found))


def captions(root: ET.Element) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter("figcaption")]


def picture(root: ET.Element, caption: str) -> ET.Element:
    return next(
        svg
        for node in root.iter("figure")
        if caption in "".join(next(node.iter("figcaption")).itertext())
        for svg in node.iter(f"{SVG}svg")
    )


def words(svg: ET.Element) -> list[str]:
    return ["".join(node.itertext()).replace("\N{NO-BREAK SPACE}", " ") for node in svg.iter(f"{SVG}text")]


def plain(node: ET.Element) -> str:
    return " ".join("".join(node.itertext()).replace("\N{NO-BREAK SPACE}", " ").split())


def table_rows(root: ET.Element) -> list[list[str]]:
    return [[plain(cell) for cell in row] for row in root.iter("tr")]


# --- nothing is fetched, nothing runs -------------------------------------------------------------


def everywhere(hostile: str) -> dict[str, Any]:
    """A report in which a stranger chose every word."""
    made = report()
    renamed = figures(
        accuracy={hostile: 0.5}, ece={hostile: 0.1}, reliability={hostile: figures()["reliability"]["kind"]}
    )
    renamed["risk_coverage"]["fields"] = {hostile: renamed["risk_coverage"]["decision"]}
    renamed["floors"] = {hostile: {**renamed["floors"]["kind"], "over": [hostile], "verdict": hostile}}
    made.update(
        bundle=dict.fromkeys(("name", "version", "target"), hostile),
        precision=hostile,
        verification=hostile,
        size_bytes={hostile: 5},
        parity={hostile: {hostile: hostile}},
        quality={hostile: {hostile: renamed}},
        calibration={hostile: {hostile: 1.0}},
        floors={hostile: {hostile: {**CHOSEN, "over": [hostile]}}},
        lines={hostile: {hostile: 3}},
        checkpoint={"architecture": hostile, "parameters": 1, "sha256": hostile},
        tools={hostile: hostile},
        evidence=[dict.fromkeys(("target", "word", "provider", "machine", "emulator", "device", "compiler"), hostile)],
        latency={**made["latency"], "machine": hostile},
        sweep=[combination(hostile, 10, 0.1, on_front=True)],
        sensitivity=[{"layer": hostile, "kl_nats": 0.1}],
        vocabulary={hostile: hostile},
        lineage=[{hostile: [hostile]}],
        adapters={hostile: {hostile: [hostile], "files": {hostile: hostile}}},
    )
    return made


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_words(hostile: str) -> None:
    allowed = {node.tag for node in page(report()).iter()}
    attributes = {name for node in page(report()).iter() for name in node.attrib}
    root = page(everywhere(hostile))
    assert {node.tag for node in root.iter()} <= allowed
    assert {name for node in root.iter() for name in node.attrib} <= attributes


def test_hostile_name_is_still_told() -> None:
    assert "<script>alert(1)</script>" in plain(page(everywhere(HOSTILE[0])))


def test_text_that_turns_around_is_marked() -> None:
    assert text("a\u202eb\x00c\ud800") == "a\ufffdb\ufffdc\ufffd"
    assert text("Störung an Presse 4 – 80 °C\t✓ 日本") == "Störung an Presse 4 – 80 °C\t✓ 日本"


@pytest.mark.parametrize("found", [report(), bare()], ids=["everything", "bare"])
def test_page_refers_to_nothing_and_runs_nothing(found: dict[str, Any]) -> None:
    root = page(found)
    tags = {node.tag.removeprefix(SVG) for node in root.iter()}
    assert not tags & {"script", "link", "img", "image", "use", "iframe", "object", "embed", "audio", "video", "base"}
    names = {name for node in root.iter() for name in node.attrib}
    assert not {name for name in names if name.startswith("on") or name in {"href", "src", "style", "srcset"}}
    # The name of the SVG language is written like an address and is none.
    written = report_html_bytes(found).decode().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//|url\(|@import|@font-face", written)


def test_browser_is_told_to_fetch_and_run_nothing() -> None:
    root = page(report())
    policy = next(n.attrib["content"] for n in root.iter("meta") if "Security" in n.attrib.get("http-equiv", ""))
    assert "default-src 'none'" in policy
    style = next(root.iter("style")).text or ""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy


def test_page_knows_phones_and_nights() -> None:
    written = report_html_bytes(report()).decode()
    assert 'name="viewport" content="width=device-width' in written
    assert "prefers-color-scheme: dark" in written


# --- the same bytes -------------------------------------------------------------------------------


def turned(value: Any) -> Any:
    """The same JSON with its keys in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(item) for key, item in reversed(value.items())}
    return [turned(item) for item in value] if isinstance(value, list) else value


def test_equal_reports_give_equal_bytes() -> None:
    assert report_html_bytes(report()) == report_html_bytes(turned(report()))
    assert report_json_bytes(report()) == report_json_bytes(turned(report()))


def test_page_drawn_from_the_file_is_the_page_of_the_build() -> None:
    assert report_html_bytes(json.loads(report_json_bytes(report()))) == report_html_bytes(report())


# --- only what is there ---------------------------------------------------------------------------

DRAWN: dict[str, tuple[str, ...]] = {
    "latency": ("Once, at start", "For every event"),
    "sweep": ("Size against loss", "Size against speed"),
    "sensitivity": ("Loss of each layer",),
    "vocabulary": ("Rows of the head",),
    "lineage": ("What each layer is worth",),
    "quality": ("Wrong answers", "Whole decisions", "int4, each field", "kind: calibration error"),
    "size_bytes": ("Size by part",),
}


@pytest.mark.parametrize("key", DRAWN)
def test_picture_is_there_exactly_when_its_numbers_are(key: str) -> None:
    whole = captions(page(report()))
    without = captions(page(report(**{key: {} if key in BARE else None})))
    for caption in DRAWN[key]:
        assert any(caption in found for found in whole), caption
        assert not any(caption in found for found in without), caption
    assert len(whole) - len(without) >= len(DRAWN[key])


def test_bare_report_has_no_picture_and_says_how_to_get_them() -> None:
    root = page(bare())
    assert not list(root.iter(f"{SVG}svg"))
    said = plain(root)
    for what in ("latency", "quality", "sweep", "evidence"):
        assert HOW_TO[what].replace("`", "") in said, what
    assert not any(HOW_TO[what].replace("`", "") in plain(page(report())) for what in HOW_TO)


def test_quality_measured_before_bins_were_kept_is_still_drawn() -> None:
    found = page(report(quality=json.loads(QUALITY.read_text())))
    assert "Wrong answers by field and precision" in captions(found)


def test_committed_report_is_drawn() -> None:
    committed = json.loads((BUNDLE / "report.json").read_text())
    root = page(committed)
    wrong = words(picture(root, "Wrong answers"))
    assert share_text(1 - committed["quality"]["triage"]["int4"]["accuracy"]["category"]).replace("\xa0", " ") in wrong


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


# --- drawn again ----------------------------------------------------------------------------------


def test_page_is_drawn_again_with_what_a_device_measured(tmp_path: Path) -> None:
    speed, sweep = tmp_path / "bench.json", tmp_path / "sweep.json"
    speed.write_text(json.dumps(report()["latency"]))
    sweep.write_text(json.dumps(report()["sweep"]))
    before = (BUNDLE / "report.json").read_bytes()
    found = captions(ET.fromstring(redrawn(BUNDLE, bench=speed, sweep=sweep)))
    assert {"Once, at start", "For every event", "Size against loss"} <= set(found)
    assert (BUNDLE / "report.json").read_bytes() == before
    assert "Once, at start" not in captions(ET.fromstring(redrawn(BUNDLE)))


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "null"])
def test_figures_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(PermanentError) as caught:
        redrawn(BUNDLE, bench=tmp_path / "bench.json")
    assert caught.value.code == "export.report_unreadable"


@pytest.mark.parametrize("content", ["{}", "[]", '{"bundle": 1}', '{"sweep": [1]}'])
def test_report_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(PermanentError) as caught:
        redrawn(tmp_path)
    assert caught.value.code == "export.report_unreadable"


# --- reliability ----------------------------------------------------------------------------------


def test_bins_hold_every_answer_once() -> None:
    pairs = [(n / 200, n % 3 == 0) for n in range(201)]
    found = bins(pairs)
    assert sum(b.count for b in found) == len(pairs)
    assert all(b.index / 15 <= b.confidence <= (b.index + 1) / 15 for b in found)
    assert sum(b.accuracy * b.count for b in found) == pytest.approx(sum(hit for _, hit in pairs))


def test_order_of_events_does_not_change_the_bins() -> None:
    pairs = [(n * 0.618 % 1, n % 2 == 0) for n in range(500)]
    assert bins(pairs) == bins(pairs[::-1])
    assert risk_coverage(pairs, 500) == risk_coverage(pairs[::-1], 500)


def test_calibration_error_is_that_of_the_bins() -> None:
    pairs = [(0.95, True)] * 6 + [(0.95, False)] * 2 + [(0.3, False)] * 2
    assert expected_calibration_error(pairs) == pytest.approx((8 * 0.2 + 2 * 0.3) / 10)
    assert expected_calibration_error([]) == 0.0


def test_risk_falls_to_nothing_when_the_sure_answers_are_right() -> None:
    points = risk_coverage([(n / 100, n >= 40) for n in range(100)], 100)
    assert [p.wrong for p in points if p.coverage <= 0.6] == [0.0] * 12
    assert points[-1].coverage == 1.0
    assert points[-1].wrong == pytest.approx(0.4)
    assert [p.confidence for p in points] == sorted((p.confidence for p in points), reverse=True)


def test_answers_that_no_threshold_tells_apart_are_taken_together() -> None:
    points = risk_coverage([(0.9, True)] * 50 + [(0.9, False)] * 50, 100)
    assert [(p.coverage, p.confidence, p.wrong) for p in points] == [(1.0, 0.9, 0.5)]


def test_events_without_an_answer_are_never_covered() -> None:
    assert risk_coverage([(0.9, True)], 4)[-1].coverage == 0.25
    assert risk_coverage([], 4) == ()


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 20, 5000])
def test_interval_holds_its_share_and_stays_inside(share: float, count: int) -> None:
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert high > low


def test_interval_is_the_published_one() -> None:
    assert wilson_interval(0.1, 100) == pytest.approx((0.0552, 0.1744), abs=5e-5)


def rows(count: int) -> list[GoldenExample]:
    return [
        GoldenExample(event={"text": str(n)}, decision={"kind": "stop", "urgent": True, "rank": 3})
        for n in range(count)
    ]


@pytest.fixture
def measured() -> dict[str, Any]:
    def decide(event: Event) -> Outcome:
        number = int(str(event["text"]))
        if number == 9:
            raise RefusedError("event.too_long", "as on the device")
        decision = {"kind": "slow" if number == 0 else "stop", "urgent": True, "rank": 3}
        sure = 0.3 if number == 0 else 0.9 + number / 100
        return Outcome(decision, {"kind": sure, "urgent": 0.99, "rank": 0.95}, guarded=number == 1)

    return evaluate(decide, rows(10), parse_task(TASK)).as_dict()


def test_evaluation_keeps_the_bins_of_its_calibration_error(measured: dict[str, Any]) -> None:
    found = measured["reliability"]["kind"]
    assert sum(b["count"] for b in found) == 8  # ten, less the guarded and the failed one
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in found) / 8
    assert error == pytest.approx(measured["ece"]["kind"], abs=1e-4)


def test_evaluation_ranks_whole_decisions_by_their_least_sure_field(measured: dict[str, Any]) -> None:
    curve = measured["risk_coverage"]["decision"]
    assert curve[-1] == {"coverage": 0.9, "confidence": 0.3, "wrong": round(1 / 9, 4)}
    assert curve[-2]["wrong"] == 0.0
    assert max(point["confidence"] for point in curve) <= 0.95  # rank is never surer than that


def test_manifest_is_spared_the_curves(measured: dict[str, Any]) -> None:
    short = without_curves({"sort": {"int4": measured}})["sort"]["int4"]
    assert set(measured) - set(short) == {"reliability", "risk_coverage"}
    assert short["accuracy"] == measured["accuracy"]


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


# --- size -------------------------------------------------------------------------------------------------------------


def graph_of(**weights: int) -> ModelProto:
    tensors = [
        TensorProto(name=name.replace("__", "."), data_type=TensorProto.UINT8, dims=[size], raw_data=bytes(size))
        for name, size in weights.items()
    ]
    return helper.make_model(helper.make_graph([], "weights", [], [], initializer=tensors))


def test_every_byte_of_the_model_is_in_one_part() -> None:
    decoder = graph_of(
        model__layers__0__self_attn__qkv=100, model__layers__0__mlp__up=300, embed_tokens=50, strange=7, cos_cache=8
    )
    sizes = size_by_part(decoder, 500)
    assert sizes == {
        "attention": 100, "feed-forward": 300, "embedding and head": 50, "other weights": 7, "rotary tables": 8,
        "structure": 35,
    }  # fmt: skip
    assert sum(sizes.values()) == 500


def test_weight_that_decoder_and_split_head_share_is_counted_once() -> None:
    decoder, head = graph_of(embed_tokens=50, model__norm=4), graph_of(embed_tokens=50, lm_head__scales=6)
    assert size_by_part(decoder, 70, head) == {"embedding and head": 56, "norms": 4, "structure": 10}


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


# --- the command -----------------------------------------------------------------------------------------------------


def run_report(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_report(parser.add_subparsers(required=True))
    given = parser.parse_args(["report", *arguments])
    command: Callable[[argparse.Namespace], int] = given.command
    return command(given)


def test_command_draws_a_devices_figures_and_leaves_the_bundle_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(report()["latency"]))
    before = {file: file.read_bytes() for file in BUNDLE.rglob("*") if file.is_file()}
    out = tmp_path / "card.html"
    assert run_report(str(BUNDLE), "--bench", str(tmp_path / "bench.json"), "--out", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    assert "Raspberry Pi 5" in plain(ET.fromstring(out.read_bytes()))
    assert {file: file.read_bytes() for file in BUNDLE.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("inside", ["report.html", "tasks/../card.html", "model/card.html"])
def test_card_is_never_written_into_a_signed_bundle(tmp_path: Path, inside: str) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "model").mkdir(parents=True)
    (bundle / "tasks").mkdir()
    (bundle / "report.json").write_bytes(report_json_bytes(report()))
    (tmp_path / "link").symlink_to(bundle)
    for name in (bundle, tmp_path / "link"):
        with pytest.raises(RefusedError) as caught:
            run_report(str(bundle), "--out", str(name / inside))
        assert caught.value.code == "export.usage"
    assert [file.name for file in bundle.rglob("*") if file.is_file()] == ["report.json"]


def test_real_bench_is_drawn(tmp_path: Path) -> None:
    engine = Engine(open_installed_bundle(BUNDLE, read_manifest(BUNDLE)[1]), 1)
    events = [dict(example.event) for example in engine.golden("triage")[:3]]
    measured = bench(engine, "triage", events, seconds=0.2)
    (tmp_path / "bench.json").write_text(json.dumps(measured))
    root = ET.fromstring(redrawn(BUNDLE, bench=tmp_path / "bench.json"))
    shown = words(picture(root, "Once, at start")) + words(picture(root, "For every event"))
    for key in ("prefix_prefill_ms", "event_prefill_ms", "decode_pass_ms", "p50_ms", "p95_ms"):
        assert duration_text(measured[key]).replace("\N{NO-BREAK SPACE}", " ") in shown, key
