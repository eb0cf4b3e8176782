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
from export.boards import buildable_board
from export.bundle import check_out, tool_versions
from export.pipeline import Pipeline, Progress, StageTiming
from export.request import BuildRequest, Labelled, Measurement, read_all_labelled
from export.source import Checkpoint, open_checkpoint
from export.stages.fuse import fuse
from export.stages.package import package
from export.stages.prove import Candidate, prove, task_bytes
from export.stages.quantise import quantise
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
    check_out(out, force=place.force)
    request.identity.check()
    buildable_board(request.identity.target)
    work = place.work or out.parent / f".{out.name}.work"
    pipeline = Pipeline(work, place.progress, tool_versions())
    with pipeline.watched("source"):
        checkpoint = open_checkpoint(request.checkpoint)
        context = min(checkpoint.max_positions, request.max_context_tokens)
        tasks = tuple(open_tasks(request.tasks, context))
        labelled = read_all_labelled(request.measurement, list(tasks))
        place.progress.line(
            f"checkpoint: {checkpoint.architecture}, {checkpoint.parameters:,} parameters, {len(tasks)} task(s)"
        )
    with pipeline.opened():
        candidate = _model_stages(request, pipeline, checkpoint, context, tasks)
        proven = _prove_stage(request, pipeline, candidate, labelled)
        with pipeline.watched("package"):
            digest, manifest, report = package(candidate.parts, proven, out, key, force=place.force)
            place.progress.line(
                f"bundle: {manifest.size_bytes:,} bytes in {len(manifest.files)} files, digest {digest}"
            )
    if place.work is None:
        shutil.rmtree(work, ignore_errors=True)
    return BuildResult(digest, manifest, report, tuple(pipeline.timings))


def _model_stages(
    request: BuildRequest, pipeline: Pipeline, checkpoint: Checkpoint, context: int, tasks: tuple[TaskFolder, ...]
) -> Candidate:
    say = pipeline.progress
    identity = {"checkpoint": checkpoint.sha256, "context_tokens": context}
    fused = pipeline.stage("fuse", identity, lambda folder: fuse(checkpoint, context, folder, say))
    shipped, upstream = fused, "fuse"
    if request.precision == "int4":
        settings, upstream = request.quantisation, "quantise"
        shipped = pipeline.stage(
            "quantise", asdict(settings), lambda folder: quantise(fused, settings, folder, say), after=("fuse",)
        )
    special = pipeline.stage("specialise", {}, lambda folder: specialise(shipped, folder), after=(upstream,))
    quality = request.measurement.quality
    parts = Parts(request.identity, checkpoint, tasks, special, texts={}, quality=quality, provenance={})
    return Candidate(parts, fused, request.precision)


def _prove_stage(
    request: BuildRequest, pipeline: Pipeline, candidate: Candidate, labelled: dict[str, Labelled]
) -> Path:
    inputs = {
        "tasks": task_bytes(candidate.parts.tasks),
        "identity": asdict(request.identity),
        "quality": request.measurement.quality,
        "labelled": _data_hashes(request.measurement),
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
