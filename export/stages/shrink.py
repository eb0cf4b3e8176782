"""Stage *shrink*: a smaller checkpoint of the one that was given, before anything else is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_agent.errors import RefusedError
from edge_agent.fs import sha256_file
from export.checkpoint.source import Checkpoint
from export.pipeline import Progress
from export.request import Shrinking
from export.smaller.distil import Distillation, distil
from export.smaller.lessons import read_rows
from export.smaller.prune import Pruning, drop_layers
from export.smaller.recovery import PRUNED_RATE, STUDENT_RATE, Training
from export.tasks import TaskFolder

CHECKPOINT_DIR = "checkpoint"
FACTS_NAME = "shrinking.json"


def shrink(
    wanted: Shrinking, checkpoint: Checkpoint, tasks: tuple[TaskFolder, ...], folder: Path, progress: Progress
) -> None:
    """Drop layers, or teach a smaller network.

    Args:
        wanted: what to do, and on which events.
        checkpoint: the whole one.
        tasks: the bundle's only task.
        folder: receives ``checkpoint/`` and ``shrinking.json``; training goes on in a folder beside it when it was
            interrupted.
        progress: is told how far it is.

    Raises:
        RefusedError: ``export.usage`` with several tasks.
        EdgeError: what `export.smaller.prune` and `export.smaller.distil` raise.
    """
    if len(tasks) != 1:
        raise RefusedError(
            "export.usage", "a smaller checkpoint is made for one task: build each task's bundle by itself"
        )
    task = tasks[0].spec
    training = Training(
        minutes=None if wanted.steps else wanted.minutes,
        steps=wanted.steps,
        peak_rate=PRUNED_RATE if wanted.distil_into is None else STUDENT_RATE,
    )
    given: dict[str, Any] = {
        "source": checkpoint.path,
        "out": folder / CHECKPOINT_DIR,
        "task": task,
        "rows": read_rows(wanted.data, task),
        "work": folder.parent / "training",
        "log": progress.line,
    }
    if wanted.distil_into is not None:
        facts = distil(wanted=Distillation(wanted.distil_into, training), **given)
    else:
        facts = drop_layers(pruning=Pruning(wanted.drop_layers, training), **given)
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")


def shrink_key(wanted: Shrinking, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the smaller checkpoint depends on: content of files, not their names."""
    into = wanted.distil_into
    is_file = into is not None and Path(into).is_file()
    return {
        "checkpoint": checkpoint.sha256,
        "drop_layers": wanted.drop_layers,
        "distil_into": sha256_file(Path(str(into))) if is_file else into,
        "data": sha256_file(wanted.data),
        "minutes": wanted.minutes,
        "steps": wanted.steps,
    }


def shrinking_facts(shrunk: Path) -> dict[str, Any]:
    """What was done, for manifest and report card."""
    facts: dict[str, Any] = json.loads((shrunk / FACTS_NAME).read_text("utf-8"))
    return facts
