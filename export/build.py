"""``edge-export build``: source -> reference -> fuse -> quantise -> specialise -> prove -> package.

Every stage leaves its outputs in a work folder (`export.pipeline`), so that a build that was interrupted, refused or
asked for differently goes on from the last stage whose inputs are the same.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.contract.manifest import Manifest
from edge_agent.fs import sha256_file
from export.assembly import Parts
from export.boards import Board, buildable_board
from export.bundle import check_out, tool_versions
from export.pipeline import Pipeline, Progress, StageTiming
from export.plan import Plan, free_bytes_at, plan, require_work_space
from export.request import BuildRequest, Labelled, Measurement, read_all_labelled
from export.source import Checkpoint, open_checkpoint
from export.stages.fuse import fuse
from export.stages.package import package
from export.stages.prove import Candidate, prove, task_bytes
from export.stages.quantise import quantise
from export.stages.reference import reference
from export.stages.specialise import specialise
from export.tasks import TaskFolder, open_tasks


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
    pipeline = Pipeline(_work(out, place), place.progress, tool_versions())
    with pipeline.watched("source"):
        given = _check(request, out, place)
        place.progress.line(
            f"checkpoint: {given.checkpoint.architecture}, {given.checkpoint.parameters:,} parameters, "
            f"{len(given.tasks)} task(s)"
        )
        require_work_space(_estimate(request, given, pipeline.work), pipeline.work)
    with pipeline.opened():
        candidate = _model_stages(request, pipeline, given)
        proven = _prove_stage(request, pipeline, candidate, given.labelled)
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
    return _estimate(request, _check(request, out, place), _work(out, place))


def _check(request: BuildRequest, out: Path, place: Workplace) -> _Given:
    """Everything that can be wrong before hours are spent."""
    check_out(out, force=place.force)
    request.identity.check()
    board = buildable_board(request.identity.target)
    checkpoint = open_checkpoint(request.checkpoint)
    context_tokens = min(checkpoint.max_positions, request.max_context_tokens)
    tasks = tuple(open_tasks(request.tasks, context_tokens))
    return _Given(board, checkpoint, context_tokens, tasks, read_all_labelled(request.measurement, list(tasks)))


def _work(out: Path, place: Workplace) -> Path:
    return place.work or out.parent / f".{out.name}.work"


def _estimate(request: BuildRequest, given: _Given, work: Path) -> Plan:
    return plan(request, given.checkpoint, given.board, given.tasks, free_bytes_at(work))


def _model_stages(request: BuildRequest, pipeline: Pipeline, given: _Given) -> Candidate:
    say, checkpoint, context, tasks = pipeline.progress, given.checkpoint, given.context_tokens, given.tasks
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
        shipped = pipeline.stage(
            "quantise", asdict(settings), lambda folder: quantise(fused, settings, folder, say), after=("fuse",)
        )
    special = pipeline.stage("specialise", {}, lambda folder: specialise(shipped, folder), after=(upstream,))
    quality = request.measurement.quality
    parts = Parts(request.identity, checkpoint, tasks, special, texts={}, quality=quality, provenance={})
    return Candidate(parts, fused, request.precision, given.board, request.elsewhere)


def _prove_stage(
    request: BuildRequest, pipeline: Pipeline, candidate: Candidate, labelled: dict[str, Labelled]
) -> Path:
    inputs = {
        "tasks": task_bytes(candidate.parts.tasks),
        "identity": asdict(request.identity),
        "quality": request.measurement.quality,
        "labelled": _data_hashes(request.measurement),
        "board": candidate.board.model_dump(mode="json"),
        "elsewhere": [" ".join(one.command) for one in request.elsewhere.interpreters(candidate.board)],
    }
    return pipeline.stage(
        "prove",
        inputs,
        lambda folder: prove(candidate, labelled, folder, pipeline.progress),
        after=("fuse", "specialise"),
    )


def _data_hashes(measurement: Measurement) -> dict[str, str]:
    named = {"calibrate": measurement.calibrate_on, "evaluate": measurement.evaluate_on}
    return {f"{use} {task}": sha256_file(file) for use, files in named.items() for task, file in files.items()}
