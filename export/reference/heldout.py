"""The held-out events as a file, for the demo and the benchmarks, which cannot import `export`.

Run ``python -m export.reference.heldout --rows 1000``; with ``--split validation --out FILE`` it writes other events,
on which the reference model may be calibrated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from edge_agent.contract.task import load_golden, load_task
from edge_agent.errors import EdgeError, PermanentError
from export.reference.evaluate import HELDOUT_FILE, TASK_FILE, Row
from export.reference.generator import LabelledEvent, generate


def write_rows(path: Path, events: Iterable[LabelledEvent]) -> None:
    """Write one ``{"event": …, "decision": …}`` a line."""
    lines = (json.dumps({"event": e.event, "decision": e.decision}, ensure_ascii=False) for e in events)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def load_rows(path: Path = HELDOUT_FILE) -> Sequence[Row]:
    """Read rows back as (event, decision).

    Raises:
        PermanentError: ``task.golden_invalid`` when a row does not fit the task.
    """
    rows: list[Row] = []
    for example in load_golden(path, load_task(TASK_FILE)):
        decision = {name: value for name, value in example.decision.items() if isinstance(value, str | bool)}
        if len(decision) != len(example.decision):
            raise PermanentError("task.golden_invalid", "a decision holds a number or null", path=str(path))
        rows.append((dict(example.event), decision))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description="Write held-out events with gold decisions as JSON lines.")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="whose sentences and machines")
    parser.add_argument("--out", type=Path, default=HELDOUT_FILE)
    arguments = parser.parse_args(argv)
    try:
        write_rows(arguments.out, islice(generate(arguments.split, arguments.seed), arguments.rows))
        load_rows(arguments.out)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
