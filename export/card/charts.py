"""Small pictures as inline SVG: horizontal bars, lines, points, reliability diagrams.

Every picture is 360 units wide, so that on a phone one unit is about one pixel and no text shrinks; on a wide screen it
grows with its column. Colours are classes of `export.card.report_style`, which knows day and night. Values stand in the
picture as text, and colour is never the only mark of a series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from export.card.markup import coordinate, element, text

WIDTH = 360.0
SERIES = 6
"""Distinct colours; a seventh series begins again with the first."""
MAX_TICKS = 6
"""More would touch each other: ``3.45 MB`` is 45 units wide."""
_CHARACTER = 6.9
"""Width of a wide character of 12 units' type: what is cut to fit, fits in every system font."""
_LEFT, _RIGHT = 44.0, 12.0

Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """One value.

    Args:
        name: of the value.
        value: at least 0; None draws no bar and says so.
        written: the value as text.
        series: 0-based, decides the colour.
        interval: both ends of its uncertainty.
    """

    name: str
    value: float | None
    written: str
    series: int = 0
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """Bars under one heading."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Point:
    """One point.

    Args:
        x: position.
        y: position.
        hint: what a pointer over it is told, and a reader of the markup.
        label: short text beside it.
        kind: ``plain``; ``front`` is larger, ``knee`` ringed besides.
    """

    x: float
    y: float
    hint: str = ""
    label: str = ""
    kind: Literal["plain", "front", "knee"] = "plain"


@dataclass(frozen=True)
class Line:
    """Points that belong together, joined in their order.

    Args:
        name: in the legend.
        points: at least one.
        series: 0-based, decides the colour.
        mark: a ringed place of its own, on the line or off it.
    """

    name: str
    points: tuple[Point, ...]
    series: int = 0
    mark: Point | None = None


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Args:
        name: what is measured, with its unit.
        low: where it begins.
        high: where it ends, above ``low``.
        write: a tick as text.
        is_log: whether equal steps are equal factors; ``low`` is above 0 then.
    """

    name: str
    low: float
    high: float
    write: Format
    is_log: bool = False

    def place(self, value: float) -> float:
        """A value as a share 0..1 of the axis; what lies outside is put on the edge."""
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(at, low))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Round values inside the axis, at most `MAX_TICKS`."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            inside: list[float] = []
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**decade for decade in decades for step in steps]
                inside = [value for value in found if self.low <= value <= self.high]
                if len(inside) <= MAX_TICKS:
                    return inside
            return inside[:: max(1, math.ceil(len(inside) / MAX_TICKS))]
        step = round_step((self.high - self.low) / MAX_TICKS)
        while len(found := self._multiples(step)) > MAX_TICKS:
            step = round_step(step * 1.5)
        return found

    def _multiples(self, step: float) -> list[float]:
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def round_step(about: float) -> float:
    """The 1, 2 or 5 times a power of ten that is nearest to ``about`` from above."""
    scale = 10.0 ** math.floor(math.log10(about))
    return next(step * scale for step in (1, 2, 5, 10) if step * scale >= about * (1 - 1e-9))


def bars(title: str, groups: Sequence[Group], *, legend: Sequence[str] = ()) -> str:
    """Horizontal bars from a common zero, the value written at each.

    Args:
        title: what screen readers announce.
        groups: headings with their bars. A group of one bar without a name has its value beside its heading.
        legend: names of the series, when bars of a group differ in them.
    """
    ends = [end for group in groups for bar in group.bars for end in (bar.value, *(bar.interval or ())) if end]
    scale = max(ends, default=1.0)
    # One room for all bars: equal values are equal lengths in every group.
    value_width = max((_width(bar.written) for group in groups for bar in group.bars), default=0.0)
    is_single = all(len(group.bars) == 1 for group in groups)
    room = WIDTH if is_single else WIDTH - value_width - 12
    top, parts = _legend(legend, 0.0)
    for group in groups:
        top, drawn = _group(group, top, room / scale, room, value_in_heading=is_single)
        parts += drawn
    said = "; ".join(_group_said(group, legend) for group in groups)
    return _picture(title, said, top, parts)


def _group(group: Group, top: float, stretch: float, room: float, *, value_in_heading: bool) -> tuple[float, list[str]]:
    heading_room = WIDTH - (_width(group.bars[0].written) + 12 if value_in_heading else 0)
    parts = [_label(0.0, top + 14, _cut(group.name, heading_room))]
    y = top + 20
    for bar in group.bars:
        parts.append(_label(WIDTH, top + 14 if value_in_heading else y + 10, bar.written, "v", anchor="end"))
        parts.append(element("rect", class_="track", x=0.0, y=y, width=room, height=11.0, rx=2))
        if bar.value is not None:
            hint = element("title", text(" ".join(filter(None, (group.name, bar.name, bar.written)))))
            width = max(1.0, bar.value * stretch) if bar.value else 0.0
            kind = f"s{bar.series % SERIES}"
            parts.append(element("rect", hint, class_=kind, x=0.0, y=y, width=width, height=11.0, rx=2))
        if bar.interval:
            low, high = (coordinate(end * stretch) for end in bar.interval)
            parts.append(element("path", class_="whisker", d=f"M{low} {coordinate(y + 5.5)}H{high}"))
        y += 16
    return y + 6, parts


def _group_said(group: Group, legend: Sequence[str]) -> str:
    values = (f"{bar.name} {bar.written}".strip() if legend else bar.written for bar in group.bars)
    return f"{group.name}: {', '.join(values)}"


def plot(title: str, x: Axis, y: Axis, lines: Sequence[Line], *, height: float = 230.0) -> str:
    """Lines with a legend over two axes.

    Args:
        title: what screen readers announce.
        x: horizontal axis.
        y: vertical axis.
        lines: at least one; a single one has no legend.
        height: of the plot without its legend.
    """
    top, parts = _legend([line.name for line in lines] if len(lines) > 1 else [], 0.0, is_line=True)
    frame = _Frame(x, y, top + 20, top + height - 36)
    parts += frame.axes()
    for line in lines:
        drawn = " ".join(f"{coordinate(px)},{coordinate(py)}" for px, py in map(frame.at, line.points))
        parts.append(element("polyline", class_=f"line l{line.series % SERIES}", points=drawn))
        parts += [frame.dot(point, f"s{line.series % SERIES}", 2.5) for point in line.points]
        if line.mark is not None:
            parts.append(frame.ring(line.mark, f"line l{line.series % SERIES}", 6.5))
    said = "; ".join(
        f"{line.name}: {', '.join(p.hint for p in (*line.points, line.mark) if p is not None and p.hint)}"
        for line in lines
    )
    return _picture(title, said, top + height, parts)


def scatter(title: str, x: Axis, y: Axis, points: Sequence[Point], *, height: float = 270.0) -> str:
    """Points of which some form a front: they carry their labels, and the knee is ringed.

    The front is joined where it is a curve in this plane: one that was found with a third measure may zigzag.
    """
    frame = _Frame(x, y, 20.0, height - 36)
    parts = frame.axes()
    front = sorted((p for p in points if p.kind != "plain"), key=lambda p: (p.x, p.y))
    heights = [p.y for p in front]
    if len(front) > 1 and heights in (sorted(heights), sorted(heights, reverse=True)):
        drawn = " ".join(f"{coordinate(px)},{coordinate(py)}" for px, py in map(frame.at, front))
        parts.append(element("polyline", class_="line l0", points=drawn))
    parts += [frame.dot(p, "s5", 3.0) for p in points if p.kind == "plain"]
    for point in front:
        px, py = frame.at(point)
        if point.kind == "knee":
            parts.append(element("circle", class_="ring", cx=px, cy=py, r=13.5))
        parts.append(frame.dot(point, "s0" if point.kind == "front" else "s1", 9.0))
        parts.append(_label(px, py + 3.8, point.label, "onmark", anchor="middle"))
    return _picture(title, "; ".join(point.hint for point in points), height, parts)


def reliability(title: str, points: Sequence[tuple[Point, tuple[float, float], int]], bin_width: float) -> str:
    """Accuracy over confidence beside the diagonal where both agree, and how many answers each point stands for.

    Args:
        title: what screen readers announce.
        points: (mean confidence, accuracy) with the accuracy's interval and the count of answers.
        bin_width: width of a bin, as a share of the confidence axis.
    """
    write = _per_cent
    height, counts_top = 292.0, 236.0
    frame = _Frame(Axis("confidence", 0, 1, write), Axis("right", 0, 1, write), 20.0, 200.0)
    parts = frame.axes()
    (x0, y0), (x1, y1) = frame.at(Point(0, 0)), frame.at(Point(1, 1))
    parts.append(element("line", class_="diagonal", x1=x0, y1=y0, x2=x1, y2=y1))
    largest = max((count for _, _, count in points), default=1)
    for point, (low, high), count in points:
        px, _ = frame.at(point)
        ends = [coordinate(frame.at(Point(point.x, end))[1]) for end in (low, high)]
        parts.append(element("path", class_="whisker", d=f"M{coordinate(px)} {ends[0]}V{ends[1]}"))
        parts.append(frame.dot(point, "s0", 3 + 4 * math.sqrt(count / largest)))
        left, _ = frame.at(Point(math.floor(min(point.x, 1 - 1e-9) / bin_width + 1e-9) * bin_width, 0))
        width = (x1 - x0) * bin_width - 2
        bar = max(1.0, 30 * count / largest)
        hint = element("title", text(point.hint))
        parts.append(
            element("rect", hint, class_="s5", x=left + 1, y=counts_top + 42 - bar, width=width, height=bar, rx=1)
        )
        parts.append(_label(left + 1 + width / 2, counts_top + 39 - bar, short_count(count), "tiny", anchor="middle"))
    parts.append(_label(x0 - 6, counts_top + 42, "count", "tick", anchor="end"))
    return _picture(title, "; ".join(point.hint for point, _, _ in points), height, parts)


def short_count(count: int) -> str:
    """A count in at most four characters: ``612``, ``1.2k``, ``31k``, ``2M``."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if count >= size * 0.9995:
            scaled = count / size
            return f"{scaled:.1f}".removesuffix(".0") + unit if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return str(count)


@dataclass(frozen=True)
class _Frame:
    """The area of a plot: axes and where values lie on them."""

    x: Axis
    y: Axis
    top: float
    bottom: float

    def at(self, point: Point) -> tuple[float, float]:
        width = WIDTH - _LEFT - _RIGHT
        return _LEFT + width * self.x.place(point.x), self.bottom - (self.bottom - self.top) * self.y.place(point.y)

    def dot(self, point: Point, kind: str, radius: float) -> str:
        px, py = self.at(point)
        hint = element("title", text(point.hint)) if point.hint else ""
        return element("circle", hint, class_=f"dot {kind}", cx=px, cy=py, r=radius)

    def ring(self, point: Point, kind: str, radius: float) -> str:
        px, py = self.at(point)
        hint = element("title", text(point.hint)) if point.hint else ""
        return element("circle", hint, class_=kind, cx=px, cy=py, r=radius)

    def axes(self) -> list[str]:
        right = WIDTH - _RIGHT
        # The y axis is named above its end, where the name needs no turning of heads.
        parts = [_label(0.0, self.top - 9, self.y.name, "tick")]
        for tick in self.y.ticks():
            _, py = self.at(Point(self.x.low, tick))
            parts.append(element("line", class_="grid", x1=_LEFT, y1=py, x2=right, y2=py))
            parts.append(_label(_LEFT - 6, py + 4, self.y.write(tick), "tick", anchor="end"))
        for tick in self.x.ticks():
            px, _ = self.at(Point(tick, self.y.low))
            parts.append(element("line", class_="grid", x1=px, y1=self.top, x2=px, y2=self.bottom))
            parts.append(_label(px, self.bottom + 15, self.x.write(tick), "tick", anchor="middle"))
        parts.append(_label((_LEFT + right) / 2, self.bottom + 31, self.x.name, "tick", anchor="middle"))
        return parts


def _legend(names: Sequence[str], top: float, *, is_line: bool = False) -> tuple[float, list[str]]:
    parts: list[str] = []
    x, y = 0.0, top + 12
    for series, name in enumerate(names):
        shown = _cut(name, WIDTH - 30)
        width = 24 + _width(shown) + 12
        if x and x + width > WIDTH:
            x, y = 0.0, y + 18
        kind = series % SERIES
        mark = (
            element("line", class_=f"line l{kind}", x1=x, y1=y - 4, x2=x + 20, y2=y - 4)
            if is_line
            else element("rect", class_=f"s{kind}", x=x, y=y - 10, width=14.0, height=11.0, rx=2)
        )
        parts += [mark, _label(x + (24 if is_line else 19), y, shown)]
        x += width
    return (y + 8 if names else top), parts


def _picture(title: str, said: str, height: float, parts: list[str]) -> str:
    size = f"0 0 {coordinate(WIDTH)} {coordinate(height)}"
    named = element("title", text(title)), element("desc", text(said))
    return element("svg", *named, "\n".join(parts), viewBox=size, role="img", xmlns="http://www.w3.org/2000/svg")


def _label(x: float, y: float, words: str, kind: str = "t", anchor: str | None = None) -> str:
    return element("text", text(words), class_=kind, x=x, y=y, text_anchor=anchor)


def _width(words: str) -> float:
    return len(words) * _CHARACTER


def _cut(words: str, room: float) -> str:
    fits = int(room / _CHARACTER)
    return words if len(words) <= fits else words[: max(1, fits - 1)] + "…"


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"
