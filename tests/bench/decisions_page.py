"""``docs/benchmarks.md`` and ``.json``: decisions per second of one run, on the machine that they name."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from tests.bench import ogenai_peer, page
from tests.bench.decision_rows import MODELS
from tests.bench.figures import Figure, table
from tests.bench.page import DOCS

PAGE = "benchmarks.md"
FIGURES = "benchmarks.json"
_TEMPLATE = Path(__file__).with_name("decisions_template.md")
_COLUMNS = 120
_ASIDE = ("spread", "unit", "target", "better", "met", "note")


def machine() -> dict[str, Any]:
    """What the figures were measured on, and the versions of everything that was measured."""
    found = page.machine()
    found["libraries"].update([ogenai_peer.PACKAGE.split("==")])
    return found


def as_json(figures: Sequence[Figure], found_machine: dict[str, Any]) -> str:
    """One section a model: each figure's value under its name, and beside them what else is known of it.

    ``"135m": {"decode_vs_llamacpp": 1.2, …, "spread": {"decode_vs_llamacpp": [1.1, 1.3], …}, "met": {…}, …}``.
    """
    found = dict(found_machine)
    sections: dict[str, Any] = {"format": 1, "versions": found.pop("libraries"), "machine": found}
    for name in MODELS:
        own = {f.key.removeprefix(f"{name}."): f.as_dict() for f in figures if f.key.startswith(f"{name}.")}
        if own:
            values = {key: figure["value"] for key, figure in own.items()}
            aside = {what: {key: f[what] for key, f in own.items() if f[what] not in (None, "")} for what in _ASIDE}
            sections[name] = {**values, **aside}
    return json.dumps(sections, indent=2) + "\n"


def committed_decisions(path: Path = DOCS / FIGURES) -> dict[str, Any]:
    """Figures of the committed page by key, as `tests.bench.figures.fallen_back` reads them; none if there is none."""
    if not path.is_file():
        return {}
    sections = json.loads(path.read_text("utf-8"))
    found = {}
    for name in MODELS:
        section = sections.get(name, {})
        for key, unit in section.get("unit", {}).items():
            aside = {what: section[what].get(key) for what in ("better", "met")}
            found[f"{name}.{key}"] = {"value": section[key], "unit": unit, **aside}
    return found


def write_page(
    figures: Sequence[Figure], found_machine: dict[str, Any], arguments: Sequence[str], docs: Path = DOCS
) -> None:
    """Write both files anew.

    Args:
        figures: of this run.
        found_machine: as `machine` saw it before the run.
        arguments: of the program, so that the page says how it was made.
        docs: the folder of both.
    """
    aimed, others = [f for f in figures if f.target], [f for f in figures if not f.target]
    template = Template(_TEMPLATE.read_text("utf-8"))
    words = {
        "arguments": shlex.join(arguments),
        "about": textwrap.fill(page.about(found_machine), _COLUMNS, break_on_hyphens=False),
        "targets": "\n".join(table(aimed)),
        "others": "\n".join(table(others)),
        "notes": page.notes(figures),
    }
    (docs / PAGE).write_text(template.substitute(words), "utf-8")
    (docs / FIGURES).write_text(as_json(figures, found_machine), "utf-8")
