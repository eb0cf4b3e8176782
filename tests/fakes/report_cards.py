"""A report that holds everything a report can hold, and what a reader finds on the card that is drawn of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from export.card.report import report_html_bytes

REFERENCE = Path(__file__).parents[2] / "export" / "reference"
BUNDLE, QUALITY = REFERENCE / "bundle", REFERENCE / "quality.json"
SVG = "{http://www.w3.org/2000/svg}"


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
