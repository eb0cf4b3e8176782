"""The report card of an export: ``report.json`` for programs, ``report.html`` for people. No clock, path or host."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from onnx import ModelProto

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"

_PARTS = (
    ("embedding and head", ("embed", "lm_head", "embedding")),
    ("attention", ("self_attn",)),
    ("feed-forward", ("mlp",)),
    ("norms", ("norm",)),
    ("rotary tables", ("cos_cache", "sin_cache")),
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #dde3ea; text-align: left } td.n { text-align: right }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } code { font-size: .9em; word-break: break-all }
"""


def size_by_part(model: ModelProto, graph_bytes: int) -> dict[str, int]:
    """Bytes of the weights by part of the network; the rest of the graph's files is ``structure``."""
    sizes = dict.fromkeys([part for part, _ in _PARTS] + ["other weights"], 0)
    for tensor in model.graph.initializer:
        part = next((p for p, marks in _PARTS if any(mark in tensor.name for mark in marks)), "other weights")
        sizes[part] += len(tensor.raw_data)
    sizes["structure"] = graph_bytes - sum(sizes.values())
    return {part: size for part, size in sizes.items() if size}


def report_json_bytes(report: dict[str, Any]) -> bytes:
    """Canonical bytes of ``report.json``."""
    return (json.dumps(report, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def report_html_bytes(report: dict[str, Any]) -> bytes:
    """One self-contained page: no script, no font, nothing to fetch."""
    bundle = report["bundle"]
    title = f"{bundle['name']} {bundle['version']} for {bundle['target']}"
    sizes = report["size_bytes"]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(report['precision'])}. On this target: <strong>{escape(report['verification'])}</strong>.</p>",
        "<h2>Size</h2>",
        _table(["part", "bytes"], [*sizes.items(), ("total", sum(sizes.values()))]),
        "<h2>Parity</h2>",
        _table(["check", "result"], [(key, _plain(value)) for key, value in report["parity"].items()]),
    ]
    for task, by_precision in sorted(report["quality"].items()):
        sections += [f"<h2>Quality: {escape(task)}</h2>", _quality_table(by_precision)]
    if report["calibration"]:
        sections.append("<h2>Calibration</h2>")
        rows = [(t, f, x) for t, fields in sorted(report["calibration"].items()) for f, x in sorted(fields.items())]
        sections.append(_table(["task", "field", "temperature"], rows))
    checkpoint = report["checkpoint"]
    sections += [
        "<h2>Origin</h2>",
        (
            f"<p>{escape(checkpoint['architecture'])}, {checkpoint['parameters']:,} parameters, checkpoint "
            f"<code>{escape(checkpoint['sha256'])}</code></p>"
        ),
        _table(["tool", "version"], list(report["tools"].items())),
    ]
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    ).encode()


def _quality_table(by_precision: dict[str, dict[str, Any]]) -> str:
    precisions = sorted(by_precision)
    fields = list(by_precision[precisions[0]]["accuracy"])
    rows: list[tuple[Any, ...]] = [
        (f"{field} accuracy", *(f"{by_precision[p]['accuracy'][field]:.2%}" for p in precisions)) for field in fields
    ]
    rows += [(f"{field} calibration error", *(by_precision[p]["ece"][field] for p in precisions)) for field in fields]
    rows.append(("every field right", *(f"{by_precision[p]['exact']:.2%}" for p in precisions)))
    rows.append(("events", *(by_precision[p]["rows"] for p in precisions)))
    return _table(["figure", *precisions], rows)


def _table(head: list[str], rows: list[Any]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        columns = [f'<td class="n">{v:,}</td>' if isinstance(v, int) else f"<td>{escape(str(v))}</td>" for v in row]
        lines.append(f"<tr>{''.join(columns)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
