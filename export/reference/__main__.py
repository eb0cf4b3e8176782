"""From nothing to a measured checkpoint: events, tokenizer, training, evaluation.

Run ``python -m export.reference --work /tmp/reference --minutes 60``.
The run resumes where it stopped when the work folder is given again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from itertools import islice
from pathlib import Path

from edge_agent.errors import EdgeError, from_os_error
from export.reference.evaluate import HELDOUT_FILE, evaluate_checkpoint
from export.reference.generator import generate
from export.reference.heldout import write_rows
from export.reference.train import Shape, Trainer, Training

CHECKPOINT = Path(__file__).parent / "checkpoint"
TEST_EVENTS, TEST_SEED, HELDOUT_ROWS = 2000, 1, 1000


def build(work: Path, training: Training, *, install: bool) -> None:
    """Train in ``work``, measure on the held-out split, write ``report.json``, and install the result if asked.

    Raises:
        EdgeError: what went wrong, with its code.
    """
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(work, Shape(), training)
    trainer.run()
    events = list(islice(generate("test", TEST_SEED), TEST_EVENTS))
    accuracy = evaluate_checkpoint(trainer.checkpoint, events)
    report = json.dumps(accuracy.as_dict(), indent=2) + "\n"
    (work / "report.json").write_text(report, "utf-8")
    print(report, end="")
    if install:
        shutil.copytree(trainer.checkpoint, CHECKPOINT, dirs_exist_ok=True)
        write_rows(HELDOUT_FILE, events[:HELDOUT_ROWS])


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(
        prog="python -m export.reference",
        description="Train the reference model from random weights and measure it on held-out events.",
        epilog="example: python -m export.reference --work /tmp/reference --minutes 60 --install",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the run; an old run there is resumed")
    parser.add_argument("--minutes", type=float, default=Training.minutes, help="training time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--install", action="store_true", help="copy the result into export/reference/")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        build(
            arguments.work,
            Training(minutes=arguments.minutes, seed=arguments.seed),
            install=arguments.install,
        )
    except EdgeError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(from_os_error(error, "building the reference model"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
