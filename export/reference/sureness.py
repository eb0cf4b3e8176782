"""How honest the reference model's confidences are: as they come, with temperatures, and read off lines.

    python -m export.reference.sureness     # fit on 2000 validation events, measure on 1000 others of either split

Fitted on one draw of validation events, measured on another and on test events, whose sentences and machines are new.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import islice

from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import GoldenExample, load_task
from edge_agent.errors import EdgeError
from export.proof.calibrate import best_temperature, gather_trials, sureness
from export.proof.greedy import GreedyDecoder
from export.proof.isotonic import fit_knots, helpful_knots, log_loss
from export.proof.measure import THREADS
from export.proof.reliability import Pair, expected_calibration_error
from export.reference.bundle_build import BUNDLE, CALIBRATION_SEED, TASK_FOLDER
from export.reference.generator import generate
from export.reference.vocabulary import Split
from export.tasks import TASK_NAME

OTHERS: tuple[tuple[Split, int], ...] = (("validation", 31), ("test", 1))


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m export.reference.sureness", description=__doc__)
    parser.add_argument("--fit", type=int, default=2000, metavar="EVENTS")
    parser.add_argument("--measure", type=int, default=1000, metavar="EVENTS")
    arguments = parser.parse_args(argv)
    try:
        for line in _table(arguments.fit, arguments.measure):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _table(fitted_on: int, measured_on: int) -> Sequence[str]:
    task = load_task(TASK_FOLDER / TASK_NAME)
    model = read_manifest(BUNDLE)[0].model
    decoder = GreedyDecoder(BUNDLE / model.decoder, BUNDLE / model.tokenizer, model, THREADS)
    fitting = gather_trials(decoder, task, _events("validation", CALIBRATION_SEED, fitted_on))
    temperatures = {name: best_temperature(found) for name, found in fitting.items()}
    known = {name: [sureness(trial, temperatures[name]) for trial in found] for name, found in fitting.items()}
    lines = {name: fit_knots(found) for name, found in known.items()}
    taken = {name for name, found in known.items() if helpful_knots(found) is not None}
    shown = ["| events | field | T | ECE raw | temperature | line | log loss raw | temperature | line | taken |"]
    shown.append("|---|---|---|---|---|---|---|---|---|---|")
    for split, seed in OTHERS:
        trials = gather_trials(decoder, task, _events(split, seed, measured_on))
        for name, found in trials.items():
            raw = [sureness(trial, 1.0) for trial in found]
            warm = [sureness(trial, temperatures[name]) for trial in found]
            line = lines[name]
            read: list[Pair] = [(line.read(confidence) if line else confidence, hit) for confidence, hit in warm]
            errors = " | ".join(f"{expected_calibration_error(pairs):.3f}" for pairs in (raw, warm, read))
            losses = " | ".join(f"{_mean_loss(pairs, float):.3f}" for pairs in (raw, warm, read))
            chosen = "line" if name in taken else "temperature"
            shown.append(f"| {split} | {name} | {temperatures[name]} | {errors} | {losses} | {chosen} |")
    return shown


def _events(split: Split, seed: int, count: int) -> list[GoldenExample]:
    return [GoldenExample(event=row.event, decision=dict(row.decision)) for row in islice(generate(split, seed), count)]


def _mean_loss(pairs: Sequence[Pair], read: Callable[[float], float]) -> float:
    return sum(log_loss(pair, read) for pair in pairs) / max(1, len(pairs))


if __name__ == "__main__":
    sys.exit(main())
