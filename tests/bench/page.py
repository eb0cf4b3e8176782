"""``docs/benchmarks-export.md`` and ``.json``: figures of one run, on the machine that they name."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from tests.bench.cache import ROOT, versions_of
from tests.bench.figures import Figure, table
from tests.bench.llama_cpp_peer import PACKAGE, cpu_flags

DOCS = ROOT / "docs"
PAGE = "benchmarks-export.md"
FIGURES = "benchmarks-export.json"
_TEMPLATE = Path(__file__).with_name("page_template.md")
_COLUMNS = 120
_VERSIONS = ("onnxruntime", "torch", "transformers", "mobius-onnx", "optimum", "optimum-onnx", "gguf", "numpy")


def machine() -> dict[str, Any]:
    """What the figures were measured on, without names of hosts or people."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_gb),
        "instructions": cpu_flags(),
        "python": platform.python_version(),
        "libraries": {**versions_of(*_VERSIONS), **dict([PACKAGE.split("==")])},
        "load_before": round(os.getloadavg()[0], 1),
    }


def write_page(figures: Sequence[Figure], found_machine: dict[str, Any], docs: Path = DOCS) -> None:
    """Write both files anew.

    Args:
        figures: of this run.
        found_machine: as `machine` saw it before the run.
        docs: the folder of both.
    """
    template = Template(_TEMPLATE.read_text("utf-8"))
    words = {
        "about": textwrap.fill(about(found_machine), _COLUMNS, break_on_hyphens=False),
        "targets": "\n".join(table([figure for figure in figures if figure.target])),
        "others": "\n".join(table([figure for figure in figures if not figure.target])),
        "notes": notes(figures),
    }
    (docs / PAGE).write_text(template.substitute(words), "utf-8")
    (docs / FIGURES).write_text(as_json(figures, found_machine), "utf-8")


def about(found: dict[str, Any]) -> str:
    """The machine in a sentence."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    instructions = ", ".join(found["instructions"])
    return (
        f"One run on {found['cores']} cores of an {found['architecture']} machine ({instructions}), "
        f"{found['memory_gb']} GB, load {found['load_before']} before it began. Absolute figures are this machine's; "
        f"ratios are of things that ran side by side. Python {found['python']}; {libraries}."
    )


def as_json(figures: Sequence[Figure], found_machine: dict[str, Any]) -> str:
    """The machine and the figures by key."""
    by_key = {figure.key: figure.as_dict() for figure in figures}
    return json.dumps({"format": 1, "machine": found_machine, "figures": by_key}, indent=2) + "\n"


def committed_figures(path: Path = DOCS / FIGURES) -> dict[str, Any]:
    """Figures of the committed page by key, empty where there is none yet."""
    if not path.is_file():
        return {}
    figures: dict[str, Any] = json.loads(path.read_text("utf-8"))["figures"]
    return figures


def notes(figures: Sequence[Figure]) -> str:
    """A list of the figures' notes; those of figures that have no value stand in the table."""
    lines = [f"- {figure.label}: {figure.note}" for figure in figures if figure.note and figure.value is not None]
    return "\n".join(["", "Notes:", "", *dict.fromkeys(lines), ""]) if lines else ""
