"""From the numbers of ``report.json`` to figures: a picture, a sentence on how to read it, and the numbers as a table.

Every function answers an empty string when its numbers are not there, so that the card can say how to get them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from export.card.charts import Axis, Bar, Group, Line, Point, bars, plot, reliability, round_step, scatter
from export.card.markup import (
    bytes_text,
    duration_text,
    element,
    figure_text,
    number,
    share,
    share_text,
    table,
    text,
)
from export.card.report_floors import floor_marks
from export.proof.reliability import BINS, wilson_interval

UNMEASURED = "not measured"
_LOG_FROM_FACTOR = 30.0


def figure(title: str, note: str, picture: str, numbers: str) -> str:
    """One figure: caption, picture, how to read it, and the same numbers as a table that opens on demand."""
    details = element("details", element("summary", "numbers"), numbers)
    words = element("p", text(note), class_="note") if note else ""
    return element("figure", element("figcaption", text(title)), picture, words, details)


def plots(figures: Iterable[str]) -> str:
    """Figures beside each other where there is room."""
    return element("div", "\n".join(f for f in figures if f), class_="plots")


def size_figure(sizes: Mapping[str, Any]) -> str:
    """Bytes by part of the network."""
    known = [(part, size) for part, found in sizes.items() if (size := number(found)) is not None]
    if not known:
        return ""
    known.sort(key=lambda item: (-item[1], item[0]))
    total = sum(size for _, size in known)
    groups = [
        Group(part, (Bar("", size, f"{bytes_text(size)} · {_part_text(size / max(total, 1))}"),))
        for part, size in known
    ]
    rows = [*((part, int(size)) for part, size in known), ("total", int(total))]
    title = f"Size by part: {bytes_text(total)}"
    note = "What a device stores of the model. Embedding and head count once where they share one matrix."
    return figure(title, note, bars(title, groups), table(["part", "bytes"], rows))


def _part_text(part: float) -> str:
    return share_text(part, 0) if part >= 0.005 or part <= 0 else f"< {share_text(0.01, 0)}"


def latency_figures(latency: Mapping[str, Any]) -> list[str]:
    """What is spent once at start, and what every event costs; the figures of ``edge-agent bench``."""
    phases = latency_phases(latency)
    shown = []
    for title, note, names in (
        ("Once, at start", "The prefix is the task's prompt: computed once, kept for every event.", _ONCE),
        ("For every event", "A decision is one event prefill and a few passes; p95: 19 of 20 are faster.", _EACH),
    ):
        found = [(name, phases[name]) for name in names if name in phases]
        if found:
            groups = [Group(name, (Bar("", ms, duration_text(ms)),)) for name, ms in found]
            rows = [(name, round(ms, 3)) for name, ms in found]
            shown.append(figure(title, note, bars(title, groups), table(["phase", "milliseconds"], rows)))
    return shown


_ONCE = ("load, prefix included", "prefix prefill")
_EACH = ("event prefill", "one decode pass", "whole decision, p50", "whole decision, p95")


def latency_phases(latency: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds by phase, those that were measured.

    Args:
        latency: what `edge_agent.runtime.bench.bench` returns and ``edge-agent bench --json`` writes.
    """
    load_s = number(latency.get("load_s"))
    found = {
        "load, prefix included": None if load_s is None else load_s * 1000,
        "prefix prefill": number(latency.get("prefix_prefill_ms")),
        "event prefill": number(latency.get("event_prefill_ms")),
        "one decode pass": number(latency.get("decode_pass_ms")),
        "whole decision, p50": number(latency.get("p50_ms")),
        "whole decision, p95": number(latency.get("p95_ms")),
    }
    return {name: ms for name, ms in found.items() if ms is not None and ms >= 0}


def quality_figure(by_precision: Mapping[str, Mapping[str, Any]]) -> str:
    """Wrong answers by field and precision, with what chance alone may do."""
    precisions = in_order(by_precision)
    fields = sorted({name for p in precisions for name in by_precision[p].get("accuracy", {})})
    groups = [
        Group(name, tuple(_wrong(p, series, by_precision[p], right) for series, p in enumerate(precisions)))
        for name, right in [*((field, _accuracy_of(field)) for field in fields), ("any field", _exact)]
    ]
    if not any(bar.value is not None for group in groups for bar in group.bars):
        return ""
    note = (
        "Share of events answered wrong; shorter is better. The thin line is the 95 % interval (Wilson): where the "
        "lines of two precisions overlap, their difference may be chance."
    )
    title = "Wrong answers by field and precision"
    return figure(title, note, bars(title, groups, legend=precisions), _quality_table(by_precision, precisions, fields))


Read = Callable[[Mapping[str, Any]], float | None]


def _accuracy_of(field: str) -> Read:
    return lambda figures: share(figures.get("accuracy", {}).get(field))


def _exact(figures: Mapping[str, Any]) -> float | None:
    return share(figures.get("exact"))


def _wrong(precision: str, series: int, figures: Mapping[str, Any], read: Read) -> Bar:
    right, rows = read(figures), number(figures.get("rows"))
    if right is None:
        return Bar(precision, None, UNMEASURED, series)
    interval = wilson_interval(1 - right, int(rows)) if rows and rows >= 1 else None
    return Bar(precision, 1 - right, share_text(1 - right), series, interval)


def _quality_table(by: Mapping[str, Mapping[str, Any]], precisions: Sequence[str], fields: Sequence[str]) -> str:
    rows: list[tuple[Any, ...]] = []
    for field in fields:
        rows.append((f"{field}: right", *(_share(_accuracy_of(field)(by[p])) for p in precisions)))
        rows.append((f"{field}: calibration error", *(by[p].get("ece", {}).get(field) for p in precisions)))
    for name, key in (
        ("every field right", "exact"),
        ("confident in every field", "answered"),
        ("every field right, of those", "exact_when_answered"),
    ):
        rows.append((name, *(_share(share(by[p].get(key))) for p in precisions)))
    rows += [(name, *(by[p].get(name) for p in precisions)) for name in ("rows", "failed")]
    return table(["figure", *precisions], rows)


def _share(found: float | None) -> str | None:
    return None if found is None else share_text(found, 2)


def reliability_figures(figures: Mapping[str, Any], temperatures: Mapping[str, Any]) -> list[str]:
    """One diagram a field: accuracy over confidence, in fifteen bins."""
    shown = []
    for field, found in sorted((figures.get("reliability") or {}).items()):
        bins = [b for b in _with_shares(found, "confidence", "accuracy") if (number(b.get("count")) or 0) >= 1]
        if not bins:
            continue
        ece, temperature = number(figures.get("ece", {}).get(field)), number(temperatures.get(field))
        facts = [f"calibration error {figure_text(ece)}", f"{sum(b['count'] for b in bins):,} answers"]
        facts += [] if temperature is None else [f"temperature {figure_text(temperature)}"]
        points = [_bin(b) for b in bins]
        rows = [(_bin_name(b), b["count"], b["confidence"], b["accuracy"]) for b in bins]
        title = f"{field}: {', '.join(facts)}"
        picture = reliability(title, points, 1 / BINS)
        shown.append(figure(title, "", picture, table(["bin", "count", "mean confidence", "share right"], rows)))
    return shown


def _bin(found: Mapping[str, Any]) -> tuple[Point, tuple[float, float], int]:
    confidence, accuracy, count = found["confidence"], found["accuracy"], int(found["count"])
    hint = f"confidence {share_text(confidence)}, right {share_text(accuracy)}, {count:,} answers"
    return Point(confidence, accuracy, hint), wilson_interval(accuracy, count), count


def _bin_name(found: Mapping[str, Any]) -> str:
    index = number(found.get("bin"))
    if index is None:
        return UNMEASURED
    return f"{index / BINS:.3f} to {(index + 1) / BINS:.3f}".replace(" ", "\N{NO-BREAK SPACE}")


def _with_shares(rows: Iterable[Mapping[str, Any]] | None, *keys: str) -> list[Mapping[str, Any]]:
    """The rows that can be drawn: all of these are shares of one."""
    return [row for row in rows or () if all(share(row.get(key)) is not None for key in keys)]


def risk_figures(by_precision: Mapping[str, Mapping[str, Any]], shipped: str) -> list[str]:
    """What leaving the least sure answers to someone else buys: by precision for whole decisions, and by field."""
    whole = {p: (by_precision[p].get("risk_coverage") or {}).get("decision") for p in in_order(by_precision)}
    fields = (by_precision[shipped].get("risk_coverage") or {}).get("fields") or {}
    marks = floor_marks(by_precision[shipped].get("floors") or {})
    return [
        found
        for found in (
            _risk_figure("Whole decisions: errors against coverage", whole, _RISK_NOTE, {}),
            _risk_figure(
                f"{shipped}, each field: errors against coverage",
                dict(sorted(fields.items())),
                _MARK_NOTE if marks else "",
                marks,
            ),
        )
        if found
    ]


_RISK_NOTE = (
    "From left to right the threshold falls: more events are answered by the device, and more of those answers are "
    "wrong. The numbers say which confidence to ask for at an error rate that you accept."
)

_MARK_NOTE = (
    "Ringed: the field's floor. It lies off the line where the floor looks at other fields' confidence too, or where a "
    "guard changed values."
)


def _risk_figure(title: str, curves: Mapping[str, Any], note: str, marks: Mapping[str, Point]) -> str:
    lines, rows = [], []
    for series, (name, found) in enumerate(curves.items()):
        points = _with_shares(found, "coverage", "wrong", "confidence")
        if points:
            hints = [f"{share_text(p['coverage'])} answered, {share_text(p['wrong'])} of them wrong" for p in points]
            drawn = tuple(Point(p["coverage"], p["wrong"], hint) for p, hint in zip(points, hints, strict=True))
            lines.append(Line(name, drawn, series, marks.get(name)))
            rows += [(name, p["confidence"], p["coverage"], p["wrong"]) for p in points]
    if not lines:
        return ""
    x = Axis("share of events answered", 0, 1, lambda part: f"{100 * part:.0f} %")
    shown = [p for line in lines for p in (*line.points, line.mark) if p is not None]
    y = _from_zero("wrong, of those answered", [p.y for p in shown])
    numbers = table(["curve", "confidence at least", "answered", "wrong of those"], rows)
    return figure(title, note, plot(title, x, y, lines), numbers)


def _from_zero(name: str, shares: Sequence[float]) -> Axis:
    top = max(*shares, 0.001)
    step = round_step(top / 5)
    digits = 0 if step >= 0.01 else 1 if step >= 0.001 else 2
    return Axis(name, 0, step * -(-top // step), lambda part: f"{100 * part:.{digits}f} %")


def front_figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Size against loss, errors and speed of a sweep's combinations; the front joined, the knee ringed."""
    known = sorted(
        (row for row in rows if (number(row.get("bytes")) or 0) > 0),
        key=lambda row: (number(row.get("bytes")), str(row.get("label"))),
    )
    front = [row for row in known if row.get("on_front") or row.get("knee")]
    marks = {id(row): str(index) for index, row in enumerate(front, start=1)}
    note = "Numbered: no other combination is better in one respect without being worse in another. Ringed: the knee."
    shown = []
    for title, key, name, beside in (
        ("Size against loss", "kl_nats", "divergence from fp32, nats", ("top1", "perplexity_ratio")),
        ("Size against right answers", "accuracy", "every field right", ()),
        ("Size against speed", "decode_tok_per_s", "decode, tokens/s", ("prefill_tok_per_s",)),
    ):
        usable = [row for row in known if number(row.get(key)) is not None]
        if usable:
            points = [_sweep_point(row, key, marks.get(id(row), "")) for row in usable]
            y = _axis(name, [p.y for p in points], is_share=key == "accuracy")
            picture = scatter(title, _axis("size", [p.x for p in points], is_bytes=True), y, points)
            numbers = _sweep_table(known, marks, ("bytes", key, *beside))
            shown.append(figure(title, note, picture, numbers))
    return shown


def _sweep_point(row: Mapping[str, Any], key: str, mark: str) -> Point:
    value = share_text(row[key]) if key == "accuracy" else figure_text(row[key])
    hint = (
        f"{mark + ' ' if mark else ''}{row.get('label')}: {bytes_text(row['bytes'])}, {key.replace('_', ' ')} {value}"
    )
    return Point(row["bytes"], row[key], hint, mark, "knee" if row.get("knee") else "front" if mark else "plain")


def _axis(name: str, values: Sequence[float], *, is_bytes: bool = False, is_share: bool = False) -> Axis:
    low, high = min(values), max(values)
    write = bytes_text if is_bytes else share_text if is_share else figure_text
    if low > 0 and high / low > _LOG_FROM_FACTOR:
        return Axis(name, low / 1.5, high * 1.5, write, is_log=True)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    return Axis(name, low - room, high + room, write)


def _sweep_table(rows: Sequence[Mapping[str, Any]], marks: Mapping[int, str], keys: Sequence[str]) -> str:
    used = [key for key in keys if any(number(row.get(key)) is not None for row in rows)]
    lines = [
        (
            str(row.get("label")),
            (marks.get(id(row), "") + (" knee" if row.get("knee") else "")).strip(),
            *(row.get(key) for key in used),
        )
        for row in rows
    ]
    return table(["combination", "front", *(key.replace("_", " ") for key in used)], lines)


def in_order(by_precision: Mapping[str, Any]) -> list[str]:
    """Precisions by name, fp32 first: it is what the others are held against."""
    return sorted(by_precision, key=lambda name: (name != "fp32", name))
