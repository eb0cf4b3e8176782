"""The report card of an export: ``report.json`` for programs, ``report.html`` for people. No clock, path or host.

The page is a function of ``report.json`` alone, so that it can be drawn again later, with figures that must not be in a
reproducible bundle because every run measures others: speed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto

from edge_agent.errors import PermanentError
from export.card.markup import bytes_text, duration_text, element, figure_text, number, share, share_text, table, text
from export.card.report_figures import (
    front_figures,
    in_order,
    latency_figures,
    latency_phases,
    plots,
    quality_figure,
    reliability_figures,
    risk_figures,
    size_figure,
)
from export.card.report_floors import floors_section
from export.card.report_origin import facts_table, lineage_section, sensitivity_figure, vocabulary_section
from export.card.report_style import POLICY, STYLE

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"

_PARTS = (
    ("embedding and head", ("embed", "lm_head", "embedding")),
    ("attention", ("self_attn",)),
    ("feed-forward", ("mlp",)),
    ("norms", ("norm",)),
    ("rotary tables", ("cos_cache", "sin_cache")),
)

WORDS = {
    "executed": "the bundle's model ran on such a processor",
    "emulated": "it ran in an emulator of such a processor",
    "compiled": "the vendor's compiler accepted it; nothing ran",
    "unverified": "nobody compiled or ran it for this target",
}
"""What the words of verification mean, from strongest to weakest."""

HOW_TO = {
    "latency": (
        "Not measured: speed differs from run to run, and a bundle's bytes must not. Run "
        "`edge-agent bench --bundle BUNDLE --json bench.json` on the device, then "
        "`edge-export report BUNDLE --bench bench.json --out report.html`."
    ),
    "quality": "Not measured: `edge-export build … --evaluate-on FILE` answers labelled events with every precision.",
    "curves": "No bins of confidence: `edge-export build … --evaluate-on FILE` measures them.",
    "sweep": "No sweep: `edge-export build … --sweep` tries methods, block sizes and int8 layers, and draws the front.",
    "evidence": "No run of this bundle is recorded in it.",
}
"""Where a figure is missing, the command that makes it; words between backticks are set as code."""


def size_by_part(
    model: ModelProto, graph_bytes: int, *others: ModelProto, free: Collection[str] = ()
) -> dict[str, int]:
    """Bytes of the weights by part of the network; the rest of the graph's files is ``structure``.

    Args:
        model: the decoder, weights inside.
        graph_bytes: of all files of the model.
        others: graphs that ship beside it, such as a split head; a weight that both hold is one weight, by its name.
        free: names of weights that take no bytes of their own.
    """
    sizes = dict.fromkeys([part for part, _ in _PARTS] + ["other weights"], 0)
    weights = {tensor.name: len(tensor.raw_data) for graph in (model, *others) for tensor in graph.graph.initializer}
    for name in weights.keys() - set(free):
        part = next((p for p, marks in _PARTS if any(mark in name for mark in marks)), "other weights")
        sizes[part] += weights[name]
    sizes["structure"] = graph_bytes - sum(sizes.values())
    return {part: size for part, size in sizes.items() if size}


def report_json_bytes(report: Mapping[str, Any]) -> bytes:
    """Canonical bytes of ``report.json``; a number that is none (NaN, infinity) is null."""
    return (json.dumps(_finite(report), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path) -> Any:
    """Read ``report.json``, a bench or a sweep.

    Raises:
        PermanentError: ``export.report_unreadable``.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PermanentError("export.report_unreadable", f"{path}: {error}") from error


def redrawn(bundle: Path, *, bench: Path | None = None, sweep: Path | None = None) -> bytes:
    """A bundle's page with figures that are not in the bundle.

    Args:
        bundle: its directory.
        bench: what ``edge-agent bench --json`` wrote, on whatever device.
        sweep: rows of a sweep.

    Returns:
        The page.

    Raises:
        PermanentError: ``export.report_unreadable``.
    """
    report = read_object(bundle / REPORT_JSON)
    for key, file, shape in (("latency", bench, dict), ("sweep", sweep, list)):
        if file is not None:
            report[key] = read_object(file)
            if not isinstance(report[key], shape):
                raise PermanentError("export.report_unreadable", f"{file}: holds no {key} figures")
    try:
        return report_html_bytes(report)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PermanentError("export.report_unreadable", f"{bundle}: {type(error).__name__} {error}") from error


def report_html_bytes(report: Mapping[str, Any]) -> bytes:
    """One self-contained page: no script, no font, nothing to fetch, which it also tells the browser.

    Args:
        report: required: ``bundle``, ``precision``, ``verification``, ``size_bytes``, ``parity``, ``quality``,
            ``calibration``, ``checkpoint``, ``tools``. Drawn when present: ``evidence`` (a list of runs),
            ``latency`` (of ``edge-agent bench``), ``sweep`` (a list), ``sensitivity`` (a list of ``layer``,
            ``kl_nats``, ``int8``), ``floors`` (of the calibrations, by task), ``lines`` (knots of confidences that one
            temperature did not straighten, by task), ``adapters`` (by task), ``vocabulary`` and ``lineage``
            (see `export.card.report_origin`).

    Returns:
        UTF-8 HTML that is well-formed XML too; equal reports give equal bytes.
    """
    # What was read back from report.json and what was just made must be the same page.
    report = json.loads(report_json_bytes(report))
    bundle = report["bundle"]
    title = f"{bundle['name']} {bundle['version']} for {bundle['target']}"
    body = "\n".join(
        [
            element("h1", text(title)),
            _headline(report),
            _section("Verification", _verification(report)),
            _section("Size", plots([size_figure(report["size_bytes"])])),
            _section("Latency", _latency(report)),
            *(_section(f"Quality: {name}", _quality(report, name)) for name in sorted(report["quality"])),
            *([] if report["quality"] else [_section("Quality", _unmeasured_floors(report), _how_to("quality"))]),
            _section(
                "Size, quality and speed",
                plots(front_figures(report.get("sweep") or [])) if report.get("sweep") else _how_to("sweep"),
            ),
            _section("Parity", facts_table(report["parity"])),
            *_optional(report),
            _section("Origin", _origin(report)),
        ]
    )
    head = "".join(
        [
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", text(title)),
            f"<style>{STYLE}</style>",
        ]
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'.encode()


def _section(title: str, *content: str) -> str:
    return element("section", element("h2", text(title)), "\n", *content)


def _how_to(what: str) -> str:
    return element("p", _with_code(HOW_TO[what]), class_="missing")


def _with_code(sentence: str) -> str:
    pieces = sentence.split("`")
    return "".join(element("code", text(p)) if index % 2 else text(p) for index, p in enumerate(pieces))


def _headline(report: Mapping[str, Any]) -> str:
    word = report["verification"]
    tiles = [("model and tokenizer", bytes_text(sum(number(size) or 0 for size in report["size_bytes"].values())))]
    for task, by_precision in sorted(report["quality"].items()):
        shipped = _shipped(report, by_precision)
        for precision in dict.fromkeys((shipped, "fp32")):
            exact = share(by_precision.get(precision, {}).get("exact"))
            if exact is not None:
                tiles.append((f"{task}: every field right, {precision}", share_text(exact)))
    phases = latency_phases(report.get("latency") or {})
    tiles += [
        (name, duration_text(phases[name])) for name in ("whole decision, p50", "whole decision, p95") if name in phases
    ]
    drawn = (element("div", element("dt", text(name)), element("dd", text(value))) for name, value in tiles)
    said = element("span", text(word), class_=f"word {word if word in WORDS else ''}".strip())
    return "\n".join(
        [
            element(
                "p",
                text(report["precision"]),
                ". On this target: ",
                said,
                text(f" ({WORDS.get(word, 'no word that is known')})."),
            ),
            element("dl", *drawn, class_="tiles"),
        ]
    )


def _verification(report: Mapping[str, Any]) -> str:
    evidence = report.get("evidence") or []
    meanings = element("details", element("summary", "what the words mean"), table(["word", "meaning"], WORDS.items()))
    runs = table(["target", "word", "ran on", "same decisions"], map(_run, evidence))
    return (runs if evidence else _how_to("evidence")) + meanings


def _run(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """One run of the bundle as a line that fits a phone."""
    provider = str(record.get("provider") or "").removesuffix("ExecutionProvider")
    machine, device = record.get("machine"), record.get("device")
    place = " on ".join(str(part) for part in (provider, machine) if part) + (f" ({device})" if device else "")
    for how, key in (("emulated by", "emulator"), ("compiled by", "compiler")):
        place += f", {how} {record[key]}" if record.get(key) else ""
    same, events = record.get("same"), record.get("events")
    agreed = f"{figure_text(same)} of {figure_text(events)}" if events else figure_text(None)
    return str(record.get("target")), figure_text(record.get("word")), place.removeprefix(", "), agreed


def _latency(report: Mapping[str, Any]) -> str:
    latency = report.get("latency") or {}
    drawn = latency_figures(latency)
    if not drawn:
        return _how_to("latency")
    machine, threads = latency.get("machine") or "the machine of the bench", latency.get("threads")
    said = f"Measured on {machine}" + (f" with {figure_text(threads)} thread(s)" if threads else "")
    return element("p", text(f"{said}: another run gives other figures.")) + plots(drawn)


def _quality(report: Mapping[str, Any], task: str) -> str:
    by_precision = report["quality"][task]
    shipped = _shipped(report, by_precision)
    figures = by_precision.get(shipped, {})
    diagrams = reliability_figures(figures, report["calibration"].get(task, {}))
    curves = risk_figures(by_precision, shipped) if shipped in by_precision else []
    chosen = (report.get("floors") or {}).get(task) or {}
    floors = floors_section(figures.get("floors") or {}, chosen)
    parts = [*([floors] if floors else []), plots([quality_figure(by_precision), *curves])]
    if diagrams:
        note = (
            f"Confidence of {shipped}, in fifteen bins: on the dashed line a confidence of 80 % is right in 80 of 100 "
            "answers, below it the model is too sure. Thin lines: 95 % interval; below: answers in each bin."
        )
        parts += [element("p", text(note)), plots(diagrams)]
    else:
        parts.append(_how_to("curves"))
    return "\n".join(parts)


def _unmeasured_floors(report: Mapping[str, Any]) -> str:
    return "".join(floors_section({}, chosen) for _, chosen in sorted((report.get("floors") or {}).items()))


def _shipped(report: Mapping[str, Any], by_precision: Mapping[str, Any]) -> str:
    """Of the measured precisions the one in the bundle: ``int4`` for a bundle of ``int4-rtn-32``."""
    full = str(report["precision"])
    matching = [p for p in by_precision if full == p or full.startswith(f"{p}-")]
    return [*in_order(by_precision), *matching][-1]


def _optional(report: Mapping[str, Any]) -> list[str]:
    sections = []
    if report.get("sensitivity"):
        sections.append(_section("Sensitive layers", plots([sensitivity_figure(report["sensitivity"])])))
    if report.get("vocabulary"):
        sections.append(_section("Vocabulary", vocabulary_section(report["vocabulary"])))
    for task, adapter in sorted((report.get("adapters") or {}).items()):
        sections.append(_section(f"Adapter of {task}", facts_table(adapter)))
    if report.get("lineage"):
        sections += [_section(_step_title(step), lineage_section(step)) for step in report["lineage"]]
    return sections


def _step_title(step: Mapping[str, Any]) -> str:
    return "Before the export: distilled" if "shape" in step else "Before the export: layers taken out"


def _origin(report: Mapping[str, Any]) -> str:
    checkpoint = report["checkpoint"]
    said = f"{checkpoint['architecture']}, {checkpoint['parameters']:,} parameters, checkpoint "
    temperatures = [
        (task, field, value)
        for task, by in sorted(report["calibration"].items())
        for field, value in sorted(by.items())
    ]
    details: list[tuple[str, list[str], Any]] = []
    details += [("temperatures", ["task", "field", "temperature"], temperatures)] if temperatures else []
    lines = [
        (task, name, count) for task, by in sorted((report.get("lines") or {}).items()) for name, count in by.items()
    ]
    details += [("confidences read off a line", ["task", "field", "knots"], lines)] if lines else []
    details.append(("tools", ["tool", "version"], sorted(report["tools"].items())))
    return element("p", text(said), element("code", text(checkpoint["sha256"]))) + "".join(
        element("details", element("summary", name), table(head, rows)) for name, head, rows in details
    )
