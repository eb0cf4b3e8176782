"""The report card: nothing on it is invented, hidden, fetched or run, whatever the report holds."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from onnx import ModelProto, TensorProto, helper

from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.runtime.bench import bench
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.card.markup import duration_text, share_text, text
from export.card.report import HOW_TO, redrawn, report_html_bytes, report_json_bytes, size_by_part
from export.commands.report import add_report
from tests.fakes.report_cards import (
    BARE,
    BUNDLE,
    CHOSEN,
    QUALITY,
    SVG,
    bare,
    captions,
    combination,
    figures,
    page,
    picture,
    plain,
    report,
    words,
)

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
