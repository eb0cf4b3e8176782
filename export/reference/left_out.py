"""What each layer of the reference model is worth: two measures taken on training events, the proof on held-out ones.

Run ``python -m export.reference.left_out``. It trains nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
from itertools import islice

from edge_agent.contract.task import load_task
from export.checkpoint.model import load_model
from export.checkpoint.source import open_checkpoint
from export.proof.evaluate import read_labelled
from export.reference.bundle_build import CHECKPOINT, HELDOUT, TASK_FOLDER
from export.reference.generator import generate
from export.reference.smaller import EVENTS_SEED
from export.smaller.importance import choose_layers, only_layers
from export.smaller.lessons import LessonWriter, Row, batches
from export.smaller.prune import PROBE_LESSONS, probe_batches
from export.smaller.recovery import Training, torch_threads
from export.smaller.teacher import Teacher, fit
from export.tasks import TASK_NAME


def table(drop: int, held_out: int) -> str:
    """Markdown: one line a layer that was left out, in every round.

    Args:
        drop: rounds.
        held_out: number of held-out events; five choices each.
    """
    task, checkpoint = load_task(TASK_FOLDER / TASK_NAME), open_checkpoint(CHECKPOINT)
    writer, model = LessonWriter(checkpoint, task), load_model(checkpoint)
    drawn = [Row(e.event, dict(e.decision)) for e in islice(generate("train", EVENTS_SEED), PROBE_LESSONS)]
    probe = probe_batches([writer.lesson(row, row.decision or {}) for row in drawn], PROBE_LESSONS)
    unseen = [writer.lesson(Row(dict(r.event), {}), dict(r.decision)) for r in read_labelled(HELDOUT, task, held_out)]
    proof = list(batches(unseen, random.Random(0), tokens=Training.tokens))
    teacher = Teacher(model)
    whole = fit(model, teacher, proof)
    lines = ["without layers | influence | kl, nats | choices right, held-out", "---|---|---|---"]
    lines.append(f"none | | | {whole.right:.1%}")
    gone: list[int] = []
    for found in choose_layers(model, probe, drop):
        for layer in found.layers:
            without = sorted([*gone, layer.layer])
            with only_layers(model, [n for n in range(len(model.model.layers)) if n not in without]):
                right = fit(model, teacher, proof).right
            name = ", ".join(map(str, without))
            kl_nats = "" if layer.kl_nats is None else f"{layer.kl_nats:.3f}"
            mark = "**" if layer.layer == found.dropped else ""
            lines.append(f"{mark}{name}{mark} | {layer.influence:.3f} | {kl_nats} | {right:.1%}")
        gone.append(found.dropped)
    return "".join(f"|{line}|\n" if line.startswith("---") else f"| {line} |\n" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m export.reference.left_out", description=__doc__)
    parser.add_argument("--drop", type=int, default=2, help="rounds (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="held-out events (default %(default)s)")
    arguments = parser.parse_args(argv)
    with torch_threads(1):
        sys.stdout.write(table(arguments.drop, arguments.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
