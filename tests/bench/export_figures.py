"""The exporter's figures beside its peers', in one run.

    python -m tests.bench.export_figures                                   # the 135M shape and the reference model
    python -m tests.bench.export_figures --shape all --write-docs          # with the 0.5B shape; rewrites the page
    python -m tests.bench.export_figures --shape none --json -             # the reference model alone, as JSON

What is slow to make and always the same (checkpoints, peers' files, llama.cpp itself) is kept under ``build/bench``.
Ends with status 1 when a ratio that met its target on the committed page has fallen back by more than 15 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.figures import Figure, fallen_back, table
from tests.bench.page import as_json, committed_figures, machine, write_page
from tests.bench.reference_figures import reference_figures
from tests.bench.shape_figures import SHAPES, Settings, shape_figures

STDOUT = "-"
BUSY_SHARE = 0.5
"""Of the cores; a machine with more to do than this is told to be busy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    arguments = _arguments(argv)
    settings = Settings(arguments.rounds, arguments.steps, arguments.threads, not arguments.without_llama_cpp)
    found_machine = machine()
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started_s:5.0f} s] {line}", file=sys.stderr, flush=True)

    if found_machine["load_before"] > BUSY_SHARE * found_machine["cores"]:
        say(f"the machine is busy (load {found_machine['load_before']}): times will say more about that than about us")
    figures: list[Figure] = []
    for shape in {"all": list(SHAPES), "none": []}.get(arguments.shape, [arguments.shape]):
        figures += shape_figures(shape, settings, say)
    say("reference model: accuracy")
    figures += reference_figures(arguments.events)
    say("done")
    committed = committed_figures()
    if arguments.json == STDOUT:
        sys.stdout.write(as_json(figures, found_machine))
    else:
        print("\n".join(table(figures)))
        if arguments.json:
            Path(arguments.json).write_text(as_json(figures, found_machine), "utf-8")
    if arguments.write_docs:
        write_page(figures, found_machine)
    fallen = fallen_back(committed, figures)
    for sentence in fallen:
        print(f"fallen back: {sentence}", file=sys.stderr)
    return 1 if fallen else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.export_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=(*SHAPES, "all", "none"), default=next(iter(SHAPES)))
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="fresh processes of each engine")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="one-token passes of a process at each depth")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--events", type=int, help="only the first N held-out events of the reference model")
    parser.add_argument(
        "--without-llama-cpp", action="store_true", help="do not compile llama.cpp (some minutes, once)"
    )
    parser.add_argument("--json", metavar="FILE", help=f"write the figures there; {STDOUT} prints them alone")
    parser.add_argument("--write-docs", action="store_true", help="rewrite docs/benchmarks-export.md and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
