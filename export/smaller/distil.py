"""``--distil-into CONFIG``: a smaller network learns the checkpoint's decisions on the task's own events.

The checkpoint is the teacher. The student has its vocabulary, loses layers as `export.smaller.prune` would take them
(measured) and width as `export.smaller.student` does, and then learns the teacher's choices
(`export.smaller.recovery`). The result is an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edge_agent.contract.task import TaskSpec
from export.bundle import fresh_directory
from export.checkpoint.model import load_model
from export.checkpoint.source import Checkpoint, open_checkpoint
from export.smaller.importance import Round, choose_layers
from export.smaller.lessons import Batch, LessonWriter, Row, digest_of
from export.smaller.prune import PROBE_LESSONS, config_of_layers, kept_layers, make_work, model_of_layers, probe_batches
from export.smaller.recovery import Log, Training, teach, torch_threads
from export.smaller.smaller_checkpoint import (
    DISTILLATION_NAME,
    Model,
    new_model,
    parent_facts,
    write_checkpoint,
    write_provenance,
)
from export.smaller.student import SHAPE_KEYS, begin_from, student_config
from export.smaller.teacher import Teacher, write_lessons

Beginning = Literal["teacher", "random"]


@dataclass(frozen=True)
class Distillation:
    """What to make.

    Args:
        into: the student's shape: a name of `export.smaller.student.NAMED_SHAPES`, or the path of a JSON file.
        training: how it learns.
        beginning: its first weights: the teacher's most active parts, or random ones to compare with.
        probe_lessons: answers on which layers, channels, heads and neurons are compared.
    """

    into: str
    training: Training = field(default_factory=Training)
    beginning: Beginning = "teacher"
    probe_lessons: int = PROBE_LESSONS


def distil(
    source: Path, out: Path, task: TaskSpec, rows: Sequence[Row], wanted: Distillation, *, work: Path, log: Log
) -> dict[str, Any]:
    """Write a smaller checkpoint that decides like a larger one.

    Args:
        source: the teacher.
        out: folder of the student; absent or empty, and it appears only when all is done.
        task: whose answers are learnt.
        rows: events to learn from; those without a decision are answered by the teacher.
        wanted: what to make.
        work: folder of the training's state; the same call resumes there.
        log: receives progress.

    Returns:
        The provenance, which is also ``distillation.json`` of the student.

    Raises:
        EdgeError: ``export.*`` or ``disk.*``; nothing is left at ``out``.
    """
    checkpoint = open_checkpoint(source)
    config = student_config(wanted.into, checkpoint)
    wanted.training.check()
    with fresh_directory(out, force=False) as folder, torch_threads(wanted.training.threads):
        whole = load_model(checkpoint)
        lessons = write_lessons(rows, LessonWriter(checkpoint, task), whole)
        probe = probe_batches(lessons, wanted.probe_lessons)
        layers = int(checkpoint.config["num_hidden_layers"])
        drop = layers - int(config["num_hidden_layers"])
        rounds = choose_layers(whole, probe, drop) if drop else []
        kept = kept_layers(checkpoint, rounds)
        config = config_of_layers(config, whole.config, kept)
        student, random_left = _student(checkpoint, config, rounds, probe, wanted)
        log(
            f"student: {_words(config)}; layers {', '.join(map(str, kept))} of {layers}, "
            f"first weights {wanted.beginning}" + (f", {random_left} matrices random" if random_left else "")
        )
        make_work(work)
        taught = teach(student, Teacher(whole), lessons, wanted.training, work, log)
        facts: dict[str, Any] = {
            "format": 1,
            "parent": parent_facts(checkpoint),
            "task": {"name": task.name, "version": task.version},
            "lessons": {"sha256": digest_of(lessons), "labelled": sum(lesson.labelled for lesson in lessons)},
            "shape": {name: config[name] for name in SHAPE_KEYS if name in config},
            "beginning": wanted.beginning,
            "matrices_left_random": random_left,
            "kept_layers": kept,
            "rounds": [found.as_dict() for found in rounds],
            "training": taught.as_dict(wanted.training),
        }
        facts["parameters"] = write_checkpoint(student, config, checkpoint, folder)
        write_provenance(folder, DISTILLATION_NAME, facts)
    log(f"student of {facts['parameters']:,} parameters from {checkpoint.parameters:,}")
    return facts


def _student(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    rounds: Sequence[Round],
    probe: Sequence[Batch],
    wanted: Distillation,
) -> tuple[Model, int]:
    """The student with its first weights, and how many of its matrices are random against our will."""
    student = new_model(config, wanted.training.seed)
    if wanted.beginning == "random":
        return student, 0
    shallow = model_of_layers(checkpoint, kept_layers(checkpoint, rounds))
    return student, begin_from(shallow, student, probe)


def _words(config: dict[str, Any]) -> str:
    return ", ".join(f"{name} {config[name]}" for name in SHAPE_KEYS if name in config)
