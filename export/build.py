"""``edge-export build``: source -> reference -> fuse -> quantise -> specialise -> prove -> package.

Every stage leaves its outputs in a work folder (`export.pipeline`), so that a build that was interrupted, refused or
asked for differently goes on from the last stage whose inputs are the same.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.contract.manifest import Manifest
from export.boards import buildable_board
from export.bundle import STAGE_TOOLS, check_out, tool_versions
from export.chain import Chain, Given
from export.checkpoint.source import open_checkpoint
from export.pipeline import Pipeline, Progress, StageTiming
from export.plan import Plan, free_bytes_at, plan, require_work_space
from export.request import BuildRequest, check_options, read_all_labelled
from export.stages.adapt import open_adapters
from export.stages.fixed_shapes import chosen_soc
from export.stages.package import package
from export.tasks import check_answers, open_tasks


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
    _check_words(request, out, place)
    pipeline = Pipeline(_work(out, place), place.progress, tool_versions(STAGE_TOOLS))
    with pipeline.opened(keep=place.work is not None):
        with pipeline.watched("source"):
            given = _check(request, pipeline.scratch())
            architecture, parameters = given.checkpoint.architecture, given.checkpoint.parameters
            place.progress.line(f"checkpoint: {architecture}, {parameters:,} parameters, {len(given.tasks)} task(s)")
            estimate = _estimate(request, given, pipeline.work)
            given.board.check_memory(estimate.device_ram_bytes)
            require_work_space(estimate, pipeline.work)
        chain = Chain(request, given, pipeline)
        candidate = chain.model()
        proven = chain.prove(candidate)
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
        given = _check(request, Path(scratch))
        return _estimate(request, given, _work(out, place))


def _check_words(request: BuildRequest, out: Path, place: Workplace) -> None:
    """What can be refused without opening a file."""
    check_out(out, force=place.force)
    request.identity.check()
    board = buildable_board(request.identity.target)
    check_options(request, board)
    chosen_soc(board, request.soc)


def _check(request: BuildRequest, scratch: Path) -> Given:
    """Everything that can be wrong before hours are spent."""
    board = buildable_board(request.identity.target)
    checkpoint = open_checkpoint(
        request.checkpoint, allow_large=request.allow_large, trust=request.trust, scratch=scratch
    )
    context_tokens = min(checkpoint.max_positions, request.max_context_tokens)
    tasks = tuple(open_tasks(request.tasks, context_tokens))
    check_answers(tasks, checkpoint)
    labelled = read_all_labelled(request.measurement, list(tasks))
    adapters = open_adapters(request.adapters, tasks, checkpoint)
    return Given(board, checkpoint, context_tokens, tasks, labelled, adapters)


def _work(out: Path, place: Workplace) -> Path:
    return place.work or out.parent / f".{out.name}.work"


def _estimate(request: BuildRequest, given: Given, work: Path) -> Plan:
    return plan(request, given.checkpoint, given.board, given.tasks, free_bytes_at(work))
