"""Words and numbers as markup: what a stranger wrote stays text, and equal numbers are equal bytes.

What is written here is XML as well as HTML, so that a test can parse every page strictly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

ABSENT = "–"  # noqa: RUF001 - the dash of a table's empty cell
_SPACE = "\N{NO-BREAK SPACE}"
_FIRST_PRINTABLE = 0x20
_LONG_WORD = 24
# They turn the direction of the text around them, so that a name reads as something that it is not.
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


def text(value: object) -> str:
    """Any words as character data or attribute value.

    Args:
        value: turned into a string; characters that XML forbids and marks that turn the text's direction are
            replaced by U+FFFD, so that they are seen.

    Source:
        XML 1.0, section 2.2 (Char).
    """
    return escape("".join(character if _is_allowed(character) else "\ufffd" for character in str(value)))


def _is_allowed(character: str) -> bool:
    code = ord(character)
    if code < _FIRST_PRINTABLE:
        return character in "\t\n"
    surrogate, unassignable, control = 0xD800 <= code <= 0xDFFF, code & 0xFFFE == 0xFFFE, 0x7F <= code <= 0x9F
    return not (surrogate or unassignable or control or character in _DIRECTION_MARKS)


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element.

    Args:
        tag: its name.
        children: markup, taken as it is: plain words go through `text` first.
        attributes: by name, ``class_`` for ``class`` and ``_`` for ``-``; floats are rounded to a tenth of a unit,
            None leaves the attribute out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    content = "".join(children)
    return f"<{tag}{given}>{content}</{tag}>" if content else f"<{tag}{given} />"


def _attribute(value: object) -> str:
    return coordinate(value) if isinstance(value, float) else text(value)


def coordinate(value: float) -> str:
    """A length in units of the view box, to a tenth.

    Raises:
        ValueError: for what is no number: it would make a picture that browsers draw in part.
    """
    if not math.isfinite(value):
        raise ValueError(f"no coordinate: {value}")
    written = f"{value:.1f}"
    return "0" if written == "-0.0" else written.removesuffix(".0")


def number(value: object) -> float | None:
    """A finite number, or None for anything else: what JSON brings may be missing, NaN, a word or a truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON integers know no limit
        return None
    return found if math.isfinite(found) else None


def share(value: object) -> float | None:
    """A share of one, or None for anything else."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def bytes_text(count: float) -> str:
    """Bytes with three significant figures and a decimal unit: ``3.19 MB``."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        # 999.6 kB rounds to four figures: it is told as 1.00 MB.
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    digits = 0 if unit == "B" else max(0, 2 - math.floor(math.log10(max(abs(size), 1.0)) + 1e-9))
    return f"{size:.{digits}f}{_SPACE}{unit}"


def share_text(part: float, digits: int = 1) -> str:
    """A share of one in per cent: ``97.5 %``."""
    return f"{100 * part:.{digits}f}{_SPACE}%"


def duration_text(milliseconds: float) -> str:
    """A duration with three significant figures: ``1.25 ms``, ``340 ms``, ``1.30 s``."""
    value, unit = (milliseconds / 1000, "s") if milliseconds >= 999.5 else (milliseconds, "ms")
    digits = max(0, 2 - math.floor(math.log10(max(abs(value), 0.1)) + 1e-9))
    return f"{value:.{min(digits, 2)}f}{_SPACE}{unit}"


def figure_text(value: object) -> str:
    """A cell of a table: integers whole, other numbers with four significant figures, no number as `ABSENT`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ABSENT
    if not isinstance(value, int | float):
        return str(value)
    found = number(value)
    if found is None:
        return ABSENT
    if isinstance(value, int) or abs(found) >= 10_000:
        return f"{found:,.0f}"
    return f"{found:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself where the screen is narrower; the first column names the row.

    Args:
        head: plain words.
        rows: plain words or numbers, as many as ``head``.
    """
    written = [list(row) for row in rows]
    # A column of numbers, some of them perhaps missing, stands on the right, its heading with it.
    kinds = [
        "n" if written and index and all(row[index] is None or _is_number(row[index]) for row in written) else None
        for index in range(len(head))
    ]
    names = (element("th", text(name), scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True))
    lines = [element("tr", *names)]
    for first, *others in written:
        cells = [element("th", text(figure_text(first)), scope="row")]
        cells += [element("td", text(figure_text(value)), class_=_kind(value)) for value in others]
        lines.append(element("tr", *cells))
    return element("div", element("table", "\n".join(lines)), class_="wide")


def _kind(value: object) -> str | None:
    if _is_number(value):
        return "n"
    # A hash may be broken anywhere; words may not.
    return "long" if any(len(word) > _LONG_WORD for word in figure_text(value).split()) else None


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return value.endswith(f"{_SPACE}%")
    return isinstance(value, int | float) and not isinstance(value, bool)
