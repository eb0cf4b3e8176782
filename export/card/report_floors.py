"""The floors of a task on the card: what was asked for, what was found, and what they let through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from export.card.charts import Point
from export.card.markup import element, figure_text, number, share, share_text, table, text

NONE = "none: always unsure"
_NOTE = (
    "A value below its floor is unsure. Wrong: share of wrong values among those that pass, with its exact 95 % "
    "interval. A target is kept on events like those that its floor was chosen on; nothing is promised for others."
)


def floors_section(measured: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """A table of a row a field; empty where the task has no threshold.

    Args:
        measured: ``floors`` of the shipped precision's quality, by field.
        chosen: ``floors`` of the task's calibration, by field; they fill in where nothing was measured.
    """
    rows = [_row(name, measured.get(name) or {}, chosen.get(name) or {}) for name in sorted({*measured, *chosen})]
    if not rows:
        return ""
    head = ["field", "asked: wrong at most", "floor", "passing", "wrong of these", "on"]
    return element("p", element("strong", "Floors."), text(f" {_NOTE}")) + table(head, rows)


def floor_marks(measured: Mapping[str, Any]) -> dict[str, Point]:
    """Where each field's floor lies among its errors against coverage."""
    marks = {}
    for name, found in measured.items():
        coverage, wrong = share(found.get("coverage")), share(found.get("wrong_share"))
        if coverage is not None and wrong is not None:
            hint = f"{name}: floor {_floor(found)}, {share_text(coverage)} pass, {share_text(wrong, 2)} of them wrong"
            marks[name] = Point(coverage, wrong, hint)
    return marks


def _row(name: str, measured: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[str, ...]:
    asked = share(measured.get("max_wrong", chosen.get("max_wrong")))
    found = measured or chosen
    over = found.get("over") or chosen.get("over") or ()
    passing, wrong, where = _on_others(measured) if measured else _on_its_own(chosen)
    return (
        f"{name} (over {_joined(over)})" if over else name,
        figure_text(None) if asked is None else share_text(asked, 2),
        _floor(found),
        passing,
        wrong,
        where,
    )


def _on_others(found: Mapping[str, Any]) -> tuple[str, str, str]:
    coverage, wrong = share(found.get("coverage")), share(found.get("wrong_share"))
    ends = [end for end in map(share, found.get("interval") or ()) if end is not None]
    between = f" ({' to '.join(share_text(end, 2) for end in ends)})" if ends else ""
    verdict = found.get("verdict")
    return (
        figure_text(None) if coverage is None else share_text(coverage),
        figure_text(None) if wrong is None else share_text(wrong, 2) + between,
        "other events" + (f": {verdict}" if verdict else ""),
    )


def _on_its_own(found: Mapping[str, Any]) -> tuple[str, str, str]:
    passed, events, wrong = (number(found.get(key)) for key in ("passed", "events", "wrong"))
    needed = number(found.get("needed_events"))
    if number(found.get("floor")) is None:
        missing = "needs a better model" if needed is None else f"needs {needed:,.0f} labelled events"
        return figure_text(None), figure_text(None), missing
    return (
        f"{figure_text(passed)} of {figure_text(events)}",
        f"{figure_text(wrong)} of {figure_text(passed)}",
        "events that it was chosen on",
    )


def _floor(found: Mapping[str, Any]) -> str:
    floor = number(found.get("floor"))
    return NONE if floor is None else f"{floor:.4g}"


def _joined(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))
