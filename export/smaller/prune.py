"""``--drop-layers N``: take out the layers that the task needs least, then let the rest recover.

A layer costs its share of every pass and of every byte read; a decision engine on a gateway is bound by both. What
leaves is measured (`export.smaller.importance`), what is lost is won back by a short training against the whole model
(`export.smaller.recovery`), and the result is an ordinary checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edge_agent.contract.task import TaskSpec
from edge_agent.errors import from_os_error
from export.bundle import fresh_directory
from export.checkpoint.model import load_model
from export.checkpoint.source import Checkpoint, open_checkpoint
from export.smaller.importance import Round, check_drop, choose_layers
from export.smaller.lessons import Batch, Lesson, LessonWriter, Row, batches, digest_of
from export.smaller.recovery import Log, Training, teach, torch_threads
from export.smaller.smaller_checkpoint import PRUNING_NAME, Model, parent_facts, write_checkpoint, write_provenance
from export.smaller.teacher import Teacher, write_lessons

PROBE_LESSONS = 128
"""Answers on which layers are compared; the order of the reference model's layers is the same with 64 and with 512."""


@dataclass(frozen=True)
class Pruning:
    """What to take out.

    Args:
        drop: number of layers.
        training: the recovery; None leaves the rest as it was.
        probe_lessons: answers on which layers are compared.
    """

    drop: int
    training: Training | None = field(default_factory=Training)
    probe_lessons: int = PROBE_LESSONS


def drop_layers(
    source: Path, out: Path, task: TaskSpec, rows: Sequence[Row], pruning: Pruning, *, work: Path, log: Log
) -> dict[str, Any]:
    """Write a checkpoint with fewer layers.

    Args:
        source: the whole checkpoint.
        out: folder of the new one; absent or empty, and it appears only when all is done.
        task: whose answers count.
        rows: events to measure and train with; those without a decision are answered by the whole model.
        pruning: what to take out.
        work: folder of the training's state; the same call resumes there.
        log: receives progress.

    Returns:
        The provenance, which is also ``pruning.json`` of the new checkpoint.

    Raises:
        EdgeError: ``export.*`` or ``disk.*``; nothing is left at ``out``.
    """
    checkpoint = open_checkpoint(source)
    check_drop(int(checkpoint.config["num_hidden_layers"]), pruning.drop)
    if pruning.training is not None:
        pruning.training.check()
    threads = pruning.training.threads if pruning.training else Training.threads
    with fresh_directory(out, force=False) as folder, torch_threads(threads):
        whole = load_model(checkpoint)
        lessons = write_lessons(rows, LessonWriter(checkpoint, task), whole)
        rounds = choose_layers(whole, probe_batches(lessons, pruning.probe_lessons), pruning.drop)
        for number, found in enumerate(rounds, start=1):
            log(f"layer {found.dropped} is dropped ({number} of {pruning.drop}): {_table(found)}")
        kept = kept_layers(checkpoint, rounds)
        config = config_of_layers(checkpoint.config, whole.config, kept)
        pruned = model_of_layers(checkpoint, kept)
        facts: dict[str, Any] = {
            "format": 1,
            "parent": parent_facts(checkpoint),
            "task": {"name": task.name, "version": task.version},
            "lessons": {"sha256": digest_of(lessons), "labelled": sum(lesson.labelled for lesson in lessons)},
            "dropped": [found.dropped for found in rounds],
            "kept": kept,
            "rounds": [found.as_dict() for found in rounds],
            "recovery": None,
        }
        if pruning.training is not None:
            make_work(work)
            taught = teach(pruned, Teacher(whole), lessons, pruning.training, work, log)
            facts["recovery"] = taught.as_dict(pruning.training)
        facts["parameters"] = write_checkpoint(pruned, config, checkpoint, folder)
        write_provenance(folder, PRUNING_NAME, facts)
    log(f"{len(kept)} layers, {facts['parameters']:,} of {checkpoint.parameters:,} parameters")
    return facts


def kept_layers(checkpoint: Checkpoint, rounds: Sequence[Round]) -> list[int]:
    """Numbers of the layers that stay, ascending."""
    dropped = {found.dropped for found in rounds}
    return [layer for layer in range(int(checkpoint.config["num_hidden_layers"])) if layer not in dropped]


def model_of_layers(checkpoint: Checkpoint, kept: Sequence[int]) -> Model:
    """Load the checkpoint and keep some of its layers for good."""
    model = load_model(checkpoint)
    kinds = getattr(model.config, "layer_types", None)
    model.model.layers = torch.nn.ModuleList([model.model.layers[number] for number in kept])
    model.config.num_hidden_layers = len(kept)
    if kinds is not None:
        model.config.layer_types = [kinds[number] for number in kept]
    return model


def config_of_layers(config: dict[str, Any], parsed: Any, kept: Sequence[int]) -> dict[str, Any]:
    """``config.json`` of a model that keeps some layers.

    Args:
        config: the whole model's file.
        parsed: the same as transformers reads it: some families derive each layer's kind from its number, which
            changes here, so the kinds that layers had are written out.
        kept: numbers of the layers that stay.
    """
    changed = {**config, "num_hidden_layers": len(kept)}
    kinds = getattr(parsed, "layer_types", None)
    if kinds is not None:
        changed["layer_types"] = [kinds[number] for number in kept]
    if "max_window_layers" in changed:
        # Only a rule to derive kinds from, which are now told; it may not exceed the number of layers.
        changed["max_window_layers"] = min(int(changed["max_window_layers"]), len(kept))
    return changed


def probe_batches(lessons: Sequence[Lesson], most: int) -> list[Batch]:
    """The first lessons, in batches of similar length: what layers, channels, heads and neurons are compared on."""
    return list(batches(lessons[:most], random.Random(0), tokens=Training.tokens))  # noqa: S311 - any order will do


def make_work(work: Path) -> None:
    """Create the folder of the training's state.

    Raises:
        EdgeError: ``disk.*``.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "creating the work folder") from error


def _table(found: Round) -> str:
    tried = [(layer.layer, layer.kl_nats) for layer in found.layers if layer.kl_nats is not None]
    return ", ".join(f"{number}: {kl_nats:.4f} nats" for number, kl_nats in tried)
