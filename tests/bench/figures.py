"""Figures, their targets, and what counts as falling back. Pure: no clock, no disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

RATIO = "x"
"""Unit of figures that compare two things of one run, and so may be compared between machines."""
ALLOWED_FALL = 0.15


@dataclass(frozen=True)
class Target:
    """What a figure should reach.

    Args:
        limit: in the figure's unit.
        better: which side of the limit is good.
    """

    limit: float
    better: Literal["lower", "higher"]

    def is_met(self, value: float) -> bool:
        """Whether ``value`` is on the good side."""
        return value <= self.limit if self.better == "lower" else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.better == 'lower' else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        key: stable name, ``<subject>.<what>``.
        label: for people.
        value: median where there are several samples; None when it could not be measured.
        unit: `RATIO`, ``s``, ``GB``, ``MB``, ``points`` or ``tok/s``.
        target: None for figures that only inform.
        spread: smallest and largest sample.
        note: how it was obtained, or why not.
    """

    key: str
    label: str
    value: float | None
    unit: str
    target: Target | None = None
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where there is nothing to meet; a figure that was not measured has not met its target."""
        if self.target is None:
            return None
        return self.value is not None and self.target.is_met(self.value)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "label": self.label,
            "value": None if self.value is None else round(self.value, 4),
            "unit": self.unit,
            "target": None if self.target is None else str(self.target),
            "better": None if self.target is None else self.target.better,
            "met": self.met,
            "spread": None if self.spread is None else [round(end, 4) for end in self.spread],
            "note": self.note,
        }


def from_samples(samples: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and the span of the samples."""
    return median(samples), (min(samples), max(samples))


def fallen_back(committed: Mapping[str, Any], now: Iterable[Figure]) -> list[str]:
    """Ratios that were reached before and are worse by more than `ALLOWED_FALL` now.

    Seconds and tokens per second are left out: they say as much about the machine as about the exporter.

    Args:
        committed: figures of the committed page by key, as written by `Figure.as_dict`.
        now: figures of this run; what was not asked for is not missed.

    Returns:
        One sentence each, empty when all is well.
    """
    found = []
    for figure in now:
        before = committed.get(figure.key)
        if before is None or before["unit"] != RATIO or not before["met"]:
            continue
        if figure.value is None:
            found.append(f"{figure.key}: was {before['value']:.2f}, could not be measured now ({figure.note})")
            continue
        worst = before["value"] * (1 + ALLOWED_FALL if before["better"] == "lower" else 1 - ALLOWED_FALL)
        if not Target(worst, before["better"]).is_met(figure.value):
            found.append(f"{figure.key}: was {before['value']:.2f}, now {figure.value:.2f}")
    return found


def table(figures: Sequence[Figure], separator: str = " | ") -> list[str]:
    """Rows of a Markdown table: figure, measured, target, met."""
    rows = [("figure", "measured", "target", "met"), ("---",) * 4]
    rows += [(f.label, measured_words(f), f"{f.target} {f.unit}" if f.target else "", met_words(f)) for f in figures]
    return [f"| {separator.join(row)} |" for row in rows]


def measured_words(figure: Figure) -> str:
    """``2.31 x (2.22 to 2.38)``, or that it was not measured."""
    if figure.value is None:
        return f"not measured: {figure.note}"
    words = f"{_number(figure.value)} {figure.unit}"
    if figure.spread is not None and figure.spread[0] != figure.spread[1]:
        words += f" ({_number(figure.spread[0])} to {_number(figure.spread[1])})"
    return words


def met_words(figure: Figure) -> str:
    """``yes``, ``no``, or nothing for figures that only inform."""
    return {None: "", True: "yes", False: "no"}[figure.met]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
