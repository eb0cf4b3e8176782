"""``edge-export build``: source -> reference -> fuse -> quantise -> specialise -> prove -> package.

Every stage leaves its outputs in a work folder (`export.pipeline`), so that a build that was interrupted, refused or
asked for differently goes on from the last stage whose inputs are the same.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.contract.manifest import Manifest
from edge_agent.fs import sha256_file
from export.assembly import Parts
from export.boards import Board, buildable_board
from export.bundle import check_out, tool_versions
from export.pipeline import Pipeline, Progress, StageTiming
from export.plan import Plan, free_bytes_at, plan, require_work_space
from export.request import BuildRequest, Labelled, Measurement, Shrinking, read_all_labelled
from export.source import Checkpoint, open_checkpoint
from export.stages.fuse import fuse
from export.stages.package import package
from export.stages.prove import Candidate, prove, task_bytes
from export.stages.quantise import quantise
from export.stages.reference import reference
from export.stages.shrink import CHECKPOINT_DIR, shrink, shrink_key, shrinking_facts
from export.stages.specialise import Speciality, specialise
from export.tasks import TaskFolder, open_tasks
from export.texts import TaskTexts

CALIBRATION_TEXTS = 128
"""Texts a task that calibrated quantisation looks at; more changed nothing that could be measured."""


@dataclass(frozen=True)
class BuildResult:
    """What was built.

    Args:
        digest: hex SHA-256 of the manifest.
        manifest: the manifest.
        report: the report card.
        timings: what each stage took.
    """

    digest: str
    manifest: Manifest
    report: dict[str, Any]
    timings: tuple[StageTiming, ...]


@dataclass(frozen=True)
class Workplace:
    """Where and how a build works; none of it shows in the bundle.

    Args:
        progress: is told what happens.
        work: folder of the stages' outputs; None: beside the bundle, removed when the bundle is whole.
        force: whether an existing bundle is replaced.
    """

    progress: Progress
    work: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class _Given:
    """What was asked for, checked and read."""

    board: Board
    checkpoint: Checkpoint
    context_tokens: int
    tasks: tuple[TaskFolder, ...]
    labelled: dict[str, Labelled]
    texts_key: dict[str, Any]
    """Content of everything that tasks' texts are rendered from, for the keys of stages that look at them."""


def build(request: BuildRequest, out: Path, key: Ed25519PrivateKey, place: Workplace) -> BuildResult:
    """Build, measure, pack and sign a bundle.

    Args:
        request: what to build.
        out: the bundle's directory; it appears only when everything has succeeded.
        key: signs the manifest.
        place: where and how to work.

    Returns:
        Digest, manifest, report and timings.

    Raises:
        EdgeError: ``export.*``, ``task.*`` or ``key.*``; nothing is at ``out`` then, and finished stages stay in the
            work folder for the next try.
    """
    _check_words(request, out, place)
    pipeline = Pipeline(_work(out, place), place.progress, tool_versions())
    with pipeline.opened(keep=place.work is not None):
        with pipeline.watched("source"):
            given = _check(request, pipeline.scratch())
            architecture, parameters = given.checkpoint.architecture, given.checkpoint.parameters
            place.progress.line(f"checkpoint: {architecture}, {parameters:,} parameters, {len(given.tasks)} task(s)")
            require_work_space(_estimate(request, given, pipeline.work), pipeline.work)
        candidate = _model_stages(request, pipeline, given)
        proven = _prove_stage(request, pipeline, candidate, given)
        with pipeline.watched("package"):
            digest, manifest, report = package(candidate.parts, proven, out, key, force=place.force)
            place.progress.line(
                f"bundle: {manifest.size_bytes:,} bytes in {len(manifest.files)} files, digest {digest}"
            )
    if place.work is None:
        shutil.rmtree(pipeline.work, ignore_errors=True)
    return BuildResult(digest, manifest, report, tuple(pipeline.timings))


def plan_build(request: BuildRequest, out: Path, place: Workplace) -> Plan:
    """Check everything that `build` checks before its work begins, and foretell that work; nothing is written.

    Args:
        request: what to build.
        out: the bundle's directory.
        place: where and how to work.

    Raises:
        EdgeError: as `build`.
    """
    _check_words(request, out, place)
    with TemporaryDirectory(prefix="edge-export-") as scratch:
        return _estimate(request, _check(request, Path(scratch)), _work(out, place))


def _check_words(request: BuildRequest, out: Path, place: Workplace) -> None:
    """What can be refused without opening a file."""
    check_out(out, force=place.force)
    request.identity.check()
    buildable_board(request.identity.target).check_precision(request.precision)


def _check(request: BuildRequest, scratch: Path) -> _Given:
    """Everything that can be wrong before hours are spent."""
    board = buildable_board(request.identity.target)
    checkpoint = open_checkpoint(
        request.checkpoint, allow_large=request.allow_large, trust=request.trust, scratch=scratch
    )
    context_tokens = min(checkpoint.max_positions, request.max_context_tokens)
    tasks = tuple(open_tasks(request.tasks, context_tokens))
    labelled = read_all_labelled(request.measurement, list(tasks))
    texts_key = {"tasks": task_bytes(tasks), "labelled": _data_hashes(request.measurement)}
    return _Given(board, checkpoint, context_tokens, tasks, labelled, texts_key)


def _work(out: Path, place: Workplace) -> Path:
    return place.work or out.parent / f".{out.name}.work"


def _estimate(request: BuildRequest, given: _Given, work: Path) -> Plan:
    return plan(request, given.checkpoint, given.board, given.tasks, free_bytes_at(work))


def _model_stages(request: BuildRequest, pipeline: Pipeline, given: _Given) -> Candidate:
    say, tasks = pipeline.progress, given.tasks
    lineage: tuple[dict[str, Any], ...] = ()
    if request.shrinking is not None:
        given, lineage = _shrink_stage(request.shrinking, pipeline, given)
    checkpoint, context = given.checkpoint, given.context_tokens
    recorded = pipeline.stage(
        "reference", {"checkpoint": checkpoint.sha256}, lambda folder: reference(checkpoint, folder)
    )
    fused = pipeline.stage(
        "fuse",
        {"context_tokens": context},
        lambda folder: fuse(checkpoint, recorded, context, folder, say),
        after=("reference",),
    )
    shipped, upstream = fused, "fuse"
    if request.precision == "int4":
        settings, upstream = request.quantisation, "quantise"
        texts = TaskTexts(checkpoint).calibration(tasks, given.labelled, CALIBRATION_TEXTS)
        shipped = pipeline.stage(
            "quantise",
            {**asdict(settings), **(given.texts_key if settings.needs_texts else {})},
            lambda folder: quantise(fused, settings, texts, folder, say),
            after=("fuse",),
        )
    speciality = Speciality(given.board, request.graph, checkpoint, tasks, given.labelled)
    special = pipeline.stage(
        "specialise",
        {**given.texts_key, **request.graph.as_key(), "board": given.board.model_dump(mode="json")},
        lambda folder: specialise(speciality, shipped, folder, say),
        after=(upstream,),
    )
    quality = request.measurement.quality
    parts = Parts(request.identity, checkpoint, tasks, special, texts={}, quality=quality, lineage=lineage)
    return Candidate(parts, fused, request.precision, given.board, request.elsewhere)


def _shrink_stage(wanted: Shrinking, pipeline: Pipeline, given: _Given) -> tuple[_Given, tuple[dict[str, Any], ...]]:
    """The rest of the build works on the smaller checkpoint."""
    folder = pipeline.stage(
        "shrink",
        {**shrink_key(wanted, given.checkpoint), **given.texts_key},
        lambda folder: shrink(wanted, given.checkpoint, given.tasks, folder, pipeline.progress),
    )
    smaller = open_checkpoint(folder / CHECKPOINT_DIR)
    context_tokens = min(smaller.max_positions, given.context_tokens)
    return replace(given, checkpoint=smaller, context_tokens=context_tokens), (shrinking_facts(folder),)


def _prove_stage(request: BuildRequest, pipeline: Pipeline, candidate: Candidate, given: _Given) -> Path:
    inputs = {
        **given.texts_key,
        "identity": asdict(request.identity),
        "quality": request.measurement.quality,
        "board": candidate.board.model_dump(mode="json"),
        "elsewhere": [" ".join(one.command) for one in request.elsewhere.interpreters(candidate.board)],
    }
    return pipeline.stage(
        "prove",
        inputs,
        lambda folder: prove(candidate, given.labelled, folder, pipeline.progress),
        after=("fuse", "specialise"),
    )


def _data_hashes(measurement: Measurement) -> dict[str, str]:
    named = {"calibrate": measurement.calibrate_on, "evaluate": measurement.evaluate_on}
    return {f"{use} {task}": sha256_file(file) for use, files in named.items() for task, file in files.items()}
