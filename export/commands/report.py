"""``edge-export report``: a bundle's report card, drawn again with what must not be in the bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_agent.errors import RefusedError
from edge_agent.fs import write_atomic


def add_report(commands: Any) -> None:
    """Add the command.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned.
    """
    report = commands.add_parser(
        "report",
        help="draw a bundle's report card with measured speed",
        description="Draw a bundle's report card again with figures that differ from run to run, such as speed, and "
        "are therefore not in the bundle. The bundle is left as it is.",
        epilog="example: edge-export report ./bundle --bench bench.json --out report.html",
    )
    report.add_argument("bundle", type=Path)
    report.add_argument(
        "--bench", type=Path, metavar="FILE", help="written by `edge-agent bench --json`, on any device"
    )
    report.add_argument("--sweep", type=Path, metavar="FILE", help="rows of a sweep")
    report.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="outside the bundle")
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from export.card.report import redrawn

    out: Path = arguments.out
    if arguments.bundle.resolve() in out.resolve().parents:
        raise RefusedError("export.usage", f"{out} is in the bundle, whose every file is signed: name a place outside")
    page = redrawn(arguments.bundle, bench=arguments.bench, sweep=arguments.sweep)
    write_atomic(out, page, mode=0o644)
    print(f"{out}  {len(page):,} bytes")
    return 0
