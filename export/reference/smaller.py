"""What pruning and distillation make of the reference model: size, speed and quality of each, side by side.

Run ``python -m export.reference.smaller --work /tmp/smaller --steps 400``. Every checkpoint in the work folder is
kept: run again, the command goes on where it stopped, and with ``--only`` it makes some of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import GoldenExample, TaskSpec, load_task
from edge_agent.errors import EdgeError, RefusedError
from edge_agent.fs import write_atomic
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.checkpoint.source import open_checkpoint
from export.proof.evaluate import read_labelled
from export.proof.measure import DEADLINE_S
from export.reference.bundle_build import CHECKPOINT, HELDOUT, TASK_FOLDER, built, quality_of, reference_request
from export.reference.generator import generate
from export.smaller.distil import Beginning, Distillation, distil
from export.smaller.lessons import Row
from export.smaller.prune import Pruning, drop_layers
from export.smaller.recovery import PRUNED_RATE, Training
from export.tasks import TASK_NAME

EVENTS_SEED = 4242
SPEED_EVENTS, SPEED_ROUNDS = 100, 7
STEP_TOKENS = 1152
"""About 16 events: a short training needs many steps more than it needs quiet ones."""

DISTILLED_RATE = 1.5e-3
DISTILLED_BUDGET = 3
"""How much longer a student learns than a pruned model recovers: it begins far from its teacher."""

WIDTH_192 = {"hidden_size": 192, "intermediate_size": 512}
RESULTS_NAME = "smaller.json"
PAGE = Path(__file__).parents[2] / "docs" / "smaller-models.md"
TABLE_BEGINS, TABLE_ENDS = "<!-- table of export.reference.smaller -->", "<!-- end -->"

Make = Callable[["Bench", Path], None]


@dataclass(frozen=True)
class Bench:
    """What all variants share.

    Args:
        work: folder of the checkpoints.
        task: the reference task.
        rows: events of the training split.
        training: budget and threads; rates differ by variant.
    """

    work: Path
    task: TaskSpec
    rows: tuple[Row, ...]
    training: Training

    def pruned(self, drop: int, *, recover: bool = True) -> Make:
        """A variant with fewer layers."""
        training = replace(self.training, peak_rate=PRUNED_RATE) if recover else None

        def make(bench: Bench, out: Path) -> None:
            drop_layers(CHECKPOINT, out, bench.task, bench.rows, Pruning(drop, training), work=_state(out), log=_log)

        return make

    def distilled(self, into: str, beginning: Beginning = "teacher") -> Make:
        """A variant of another shape."""
        budget = self.training
        longer = replace(
            budget,
            steps=None if budget.steps is None else DISTILLED_BUDGET * budget.steps,
            minutes=None if budget.minutes is None else DISTILLED_BUDGET * budget.minutes,
            peak_rate=DISTILLED_RATE,
        )
        wanted = Distillation(into, longer, beginning)

        def make(bench: Bench, out: Path) -> None:
            distil(CHECKPOINT, out, bench.task, bench.rows, wanted, work=_state(out), log=_log)

        return make

    def variants(self) -> dict[str, Make | None]:
        """What is compared; the whole model needs no making."""
        return {
            "whole": None,
            "drop-1-untrained": self.pruned(1, recover=False),
            "drop-1": self.pruned(1),
            "drop-2": self.pruned(2),
            "width-192": self.distilled(str(_shape_file(self.work, WIDTH_192))),
            "half-width": self.distilled("half-width"),
            "half-width-random": self.distilled("half-width", "random"),
        }


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Args:
        name: the variant.
        layers: of the network.
        parameters: stored weights.
        steps: of training; 0 for none.
        distance_nats: from the whole model on training events held back, before and after training; None without.
        bundle_bytes: INT4 bundle, tokenizer included.
        accuracy: by field, 0..1.
        exact: share of events with every field right.
        decisions_per_s: of the device's engine, one thread, median of the rounds.
        spread: smallest and largest round.
    """

    name: str
    layers: int
    parameters: int
    steps: int
    distance_nats: tuple[float, float] | None
    bundle_bytes: int
    accuracy: dict[str, float]
    exact: float
    decisions_per_s: float
    spread: tuple[float, float]


def make_checkpoints(bench: Bench, names: Sequence[str]) -> dict[str, Path]:
    """Train what is not there yet.

    Args:
        bench: the shared part.
        names: variants; unknown ones are refused.

    Raises:
        RefusedError: ``export.usage``.
        EdgeError: ``export.*``.
    """
    known = bench.variants()
    folders: dict[str, Path] = {}
    for name in names:
        if name not in known:
            raise RefusedError("export.usage", f"no variant {name!r} among: {', '.join(known)}")
        make, out = known[name], bench.work / name
        if make is not None and not out.is_dir():
            _log(f"--- {name}")
            make(bench, out)
        folders[name] = CHECKPOINT if make is None else out
    return folders


def measure(checkpoints: dict[str, Path], task: TaskSpec, rows: Sequence[GoldenExample]) -> list[Measured]:
    """Build every variant's INT4 bundle, count right answers, and time the engines in turn.

    Args:
        checkpoints: by variant.
        task: the reference task.
        rows: labelled events that nothing was trained on.
    """
    with contextlib.ExitStack() as stack:
        plain = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Without golden examples: a variant that fails one is measured all the same.
        (plain / TASK_NAME).write_bytes((TASK_FOLDER / TASK_NAME).read_bytes())
        bundles = {
            name: stack.enter_context(built(reference_request(tasks=(plain,), quality={}, checkpoint=folder)))
            for name, folder in checkpoints.items()
        }
        speeds = decisions_per_s(bundles, task, rows[:SPEED_EVENTS])
        return [_measured(name, checkpoints[name], bundles[name], task, rows, speeds[name]) for name in bundles]


def _measured(
    name: str, folder: Path, bundle: Path, task: TaskSpec, rows: Sequence[GoldenExample], speeds: list[float]
) -> Measured:
    checkpoint, quality = open_checkpoint(folder), quality_of(bundle, task, list(rows))
    training = _training_of(folder)
    return Measured(
        name=name,
        layers=int(checkpoint.config["num_hidden_layers"]),
        parameters=checkpoint.parameters,
        steps=int(training["steps"]) if training else 0,
        distance_nats=(training["before"]["kl_nats"], training["after"]["kl_nats"]) if training else None,
        bundle_bytes=read_manifest(bundle)[0].size_bytes,
        accuracy=quality.accuracy,
        exact=quality.exact,
        decisions_per_s=statistics.median(speeds),
        spread=(min(speeds), max(speeds)),
    )


def decisions_per_s(bundles: dict[str, Path], task: TaskSpec, rows: Sequence[GoldenExample]) -> dict[str, list[float]]:
    """Speed of each round; engines take turns at every event, so that what else the machine does meets all of them."""
    engines = {name: Engine(open_installed_bundle(path, read_manifest(path)[1]), 1) for name, path in bundles.items()}
    rounds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(SPEED_ROUNDS + 1):
        spent_s = dict.fromkeys(engines, 0.0)
        for row in rows:
            for name, engine in engines.items():
                started_s = time.perf_counter()
                engine.decide(task.name, dict(row.event), deadline_s=DEADLINE_S)
                spent_s[name] += time.perf_counter() - started_s
        if number:  # the first round warms caches up
            for name, seconds in spent_s.items():
                rounds[name].append(len(rows) / seconds)
    return rounds


def as_table(measured: Sequence[Measured]) -> str:
    """Markdown, one line a variant."""
    fields = list(measured[0].accuracy)
    head = ["variant", "layers", "parameters", "steps", "nats from the whole", "INT4 bundle", "decisions/s (spread)"]
    head += [*fields, "every field"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for row in measured:
        distance = "" if row.distance_nats is None else "{:.3f} → {:.3f}".format(*row.distance_nats)
        cells = [row.name, str(row.layers), f"{row.parameters:,}", str(row.steps), distance, f"{row.bundle_bytes:,}"]
        cells.append(f"{row.decisions_per_s:.0f} ({row.spread[0]:.0f}-{row.spread[1]:.0f})")
        cells += [f"{row.accuracy[name]:.1%}" for name in fields]
        lines.append(" | ".join([*cells, f"{row.exact:.1%}"]))
    return "".join(f"|{line}|\n" if line.startswith("---") else f"| {line} |\n" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m export.reference.smaller", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints; what is there is kept")
    parser.add_argument(
        "--steps",
        type=int,
        default=400,
        help=f"training steps of a pruned variant (default 400), {DISTILLED_BUDGET} times as many of a student",
    )
    parser.add_argument("--minutes", type=float, help="about so long instead")
    parser.add_argument("--events", type=int, default=20_000, help="of the training split (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="held-out events to measure on (default %(default)s)")
    parser.add_argument("--threads", type=int, default=Training.threads)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="default: all")
    parser.add_argument("--no-table", action="store_true", help="make the checkpoints, measure nothing")
    parser.add_argument("--write", action="store_true", help="put the table into docs/smaller-models.md")
    arguments = parser.parse_args(argv)
    try:
        bench = _bench(arguments)
        folders = make_checkpoints(bench, arguments.only or list(bench.variants()))
        if not arguments.no_table:
            measured = measure(folders, bench.task, read_labelled(HELDOUT, bench.task, arguments.rows))
            content = json.dumps([row.__dict__ for row in measured], indent=2) + "\n"
            write_atomic(arguments.work / RESULTS_NAME, content.encode(), mode=0o644)
            sys.stdout.write(as_table(measured))
            if arguments.write:
                _write_into(PAGE, as_table(measured))
    except EdgeError as error:
        _log(str(error))
        return 1
    return 0


def _bench(arguments: argparse.Namespace) -> Bench:
    arguments.work.mkdir(parents=True, exist_ok=True)
    task = load_task(TASK_FOLDER / TASK_NAME)
    rows = tuple(Row(e.event, dict(e.decision)) for e in islice(generate("train", EVENTS_SEED), arguments.events))
    steps = None if arguments.minutes else arguments.steps
    return Bench(
        arguments.work,
        task,
        rows,
        Training(minutes=arguments.minutes, steps=steps, tokens=STEP_TOKENS, threads=arguments.threads),
    )


def _shape_file(work: Path, shape: dict[str, int]) -> Path:
    """A shape as a user would give it."""
    path = work / f"width-{shape['hidden_size']}.json"
    write_atomic(path, json.dumps(shape).encode(), mode=0o644)
    return path


def _state(out: Path) -> Path:
    return out.parent / f"{out.name}.training"


def _training_of(folder: Path) -> dict[str, Any] | None:
    """What the checkpoint's provenance says of its training, if it had any."""
    from export.smaller.smaller_checkpoint import read_provenance

    for facts in read_provenance(folder).values():
        found: dict[str, Any] | None = facts.get("recovery") or facts.get("training")
        return found
    return None


def _write_into(page: Path, table: str) -> None:
    """Put a table between the page's marks.

    Raises:
        RefusedError: ``export.usage`` for a page without them.
    """
    before, begin, rest = page.read_text("utf-8").partition(TABLE_BEGINS)
    _, end, after = rest.partition(TABLE_ENDS)
    if not (begin and end):
        raise RefusedError("export.usage", f"{page.name} has no place for the table")
    write_atomic(page, f"{before}{begin}\n{table}{end}{after}".encode(), mode=0o644)


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
