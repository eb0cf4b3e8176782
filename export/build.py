"""The stages of ``edge-export build``, in order: check, build, hold against the original, quantise, measure, pack, sign."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import ModelProto
from pydantic import ValidationError

from edge_agent.contract.manifest import Manifest, ModelSpec, Resources
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import copy_durable
from export.boards import Board, buildable_board
from export.bundle import check_out, fresh_directory, list_files, tool_versions, write_file, write_manifest
from export.calibrate import CALIBRATION_NAME, calibration_bytes, fit_temperatures
from export.evaluate import evaluate, greedy_backend, read_labelled
from export.graph import build_fp32, graph_shape, save_graph
from export.greedy import GreedyDecoder, StepModel
from export.parity import Agreement, against_transformers, between
from export.quantize import QuantSettings, quantize_int4
from export.report import REPORT_HTML, REPORT_JSON, report_html_bytes, report_json_bytes, size_by_part
from export.signing import sign_bundle
from export.source import TOKENIZER_NAME, Checkpoint, open_checkpoint
from export.tasks import TaskFolder, open_tasks

DECODER = "model/decoder.onnx"
MINIMUM_RUNTIME = {"onnxruntime": "1.32.0"}
RUNTIME_BASE_BYTES = 120 << 20
MAX_PARITY_TEXTS = 16
Precision = Literal["int4", "fp32"]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Identity:
    """What the bundle is called."""

    name: str
    version: str
    target: str


@dataclass(frozen=True)
class Measurement:
    """Labelled events by task name, and figures that were measured before.

    Args:
        calibrate_on: events to fit temperatures on.
        evaluate_on: events to measure accuracy on, every precision.
        quality: task -> precision -> figures of `export.evaluate.Quality`, taken as they are.
    """

    calibrate_on: dict[str, Path] = field(default_factory=dict)
    evaluate_on: dict[str, Path] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildRequest:
    """Everything that decides a bundle's bytes."""

    checkpoint: Path
    tasks: tuple[Path, ...]
    identity: Identity
    precision: Precision = "int4"
    quantisation: QuantSettings = QuantSettings()
    max_context_tokens: int = 2048
    measurement: Measurement = Measurement()


@dataclass(frozen=True)
class BuildResult:
    """What was built."""

    digest: str
    manifest: Manifest
    report: dict[str, Any]


@dataclass(frozen=True)
class _Graphs:
    """Both precisions on disk; ``shipped`` is inside the bundle."""

    fp32: Path
    shipped: Path
    shipped_model: ModelProto
    spec: ModelSpec


def build(request: BuildRequest, out: Path, key: Ed25519PrivateKey, *, force: bool, log: Log) -> BuildResult:
    """Build, measure, pack and sign a bundle.

    Args:
        request: what to build.
        out: the bundle's directory; it appears only when everything has succeeded.
        key: signs the manifest.
        force: whether an existing bundle at ``out`` is replaced.
        log: receives one line per stage.

    Returns:
        Digest, manifest and report.

    Raises:
        EdgeError: ``export.*``, ``task.*`` or ``key.*``; nothing is left at ``out``.
    """
    check_out(out, force=force)
    board = buildable_board(request.identity.target)
    checkpoint = open_checkpoint(request.checkpoint)
    context = min(checkpoint.max_positions, request.max_context_tokens)
    tasks = open_tasks(request.tasks, context)
    _check_measurement(request.measurement, tasks)
    log(f"checkpoint: {checkpoint.architecture}, {checkpoint.parameters:,} parameters, {len(tasks)} task(s)")
    with (
        fresh_directory(out, force=force) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{out.name}.", suffix=".scratch") as scratch,
    ):
        graphs = _build_graphs(request, checkpoint, context, Path(scratch), folder, log)
        copy_durable(checkpoint.path / TOKENIZER_NAME, folder / TOKENIZER_NAME)
        for task in tasks:
            for name, source in task.files().items():
                write_file(folder, name, source.read_bytes())
        report = _measure(request, checkpoint, tasks, graphs, folder, board, log)
        manifest = _pack(request, checkpoint, tasks, graphs.spec, report, folder)
        digest = sign_bundle(folder, key)
    log(f"bundle: {manifest.size_bytes:,} bytes in {len(manifest.files)} files, digest {digest}")
    return BuildResult(digest, manifest, report)


def _build_graphs(
    request: BuildRequest, checkpoint: Checkpoint, context: int, scratch: Path, folder: Path, log: Log
) -> _Graphs:
    model = build_fp32(checkpoint, context)
    fp32_path = scratch / "fp32.onnx"
    save_graph(model, fp32_path)
    precision = "fp32" if request.precision == "fp32" else request.quantisation.label
    spec = _model_spec(checkpoint, model, context, precision)
    parity = against_transformers(checkpoint, StepModel(fp32_path, spec, threads=2))
    log(f"fp32 graph: largest logit difference to transformers {parity.max_abs_diff:.2e} at {parity.positions} positions")
    if not parity.holds:
        raise PermanentError(
            "export.parity_failed",
            f"the fused graph differs from transformers by {parity.max_abs_diff:.3g} in a logit",
            max_abs_diff=parity.max_abs_diff,
            same_tokens=parity.same_tokens,
        )
    if request.precision == "int4":
        model = quantize_int4(model, request.quantisation)
    files = save_graph(model, folder / DECODER)
    log(f"{precision} graph: {sum(file.stat().st_size for file in files):,} bytes")
    return _Graphs(fp32_path, folder / DECODER, model, spec)


def _model_spec(checkpoint: Checkpoint, model: ModelProto, context: int, precision: str) -> ModelSpec:
    shape = graph_shape(model)
    return ModelSpec(
        decoder=DECODER,
        tokenizer=TOKENIZER_NAME,
        architecture=checkpoint.architecture,
        precision=precision,
        vocab_size=checkpoint.vocab_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_context_tokens=context,
        bos_token_id=checkpoint.bos_token_id,
        eos_token_id=checkpoint.eos_token_id,
    )


def _measure(
    request: BuildRequest,
    checkpoint: Checkpoint,
    tasks: list[TaskFolder],
    graphs: _Graphs,
    folder: Path,
    board: Board,
    log: Log,
) -> dict[str, Any]:
    tokenizer = folder / TOKENIZER_NAME
    shipped = GreedyDecoder(graphs.shipped, tokenizer, graphs.spec, threads=2)
    parity: dict[str, Any] = {"fp32_matches_transformers": True}
    if request.precision == "int4":
        agreement = _agreement(graphs, shipped, tasks)
        parity["int4_against_fp32"] = agreement.as_dict()
        log(f"int4 graph: same top token as fp32 at {agreement.same_top1} of {agreement.positions} positions")
    calibration: dict[str, dict[str, float]] = {}
    quality: dict[str, Any] = {name: dict(figures) for name, figures in request.measurement.quality.items()}
    for task in tasks:
        name = task.spec.name
        if name in request.measurement.calibrate_on:
            rows = read_labelled(request.measurement.calibrate_on[name], task.spec)
            calibration[name] = fit_temperatures(shipped, task.spec, rows)
            write_file(folder, f"tasks/{name}/{CALIBRATION_NAME}", calibration_bytes(calibration[name]))
            log(f"{name}: temperatures {calibration[name]} from {len(rows)} events")
        if name in request.measurement.evaluate_on:
            rows = read_labelled(request.measurement.evaluate_on[name], task.spec)
            for precision, graph in {"fp32": graphs.fp32, request.precision: graphs.shipped}.items():
                decoder = GreedyDecoder(graph, tokenizer, graphs.spec, threads=2)
                temperatures = calibration.get(name) if graph == graphs.shipped else None
                found = evaluate(greedy_backend(decoder, task.spec, temperatures), rows, task.spec)
                quality.setdefault(name, {})[precision] = found.as_dict()
                log(f"{name}: {precision} right in every field for {found.exact:.2%} of {found.rows} events")
    graph_bytes = sum(f.stat().st_size for f in graphs.shipped.parent.iterdir())
    return {
        "format": 1,
        "bundle": {
            "name": request.identity.name,
            "version": request.identity.version,
            "target": request.identity.target,
        },
        "precision": graphs.spec.precision,
        "verification": board.verification,
        "size_bytes": {
            **size_by_part(graphs.shipped_model, graph_bytes),
            "tokenizer": tokenizer.stat().st_size,
        },
        "parity": parity,
        "calibration": calibration,
        "quality": quality,
        "checkpoint": _checkpoint_facts(checkpoint),
        "tools": tool_versions(),
    }


def _agreement(graphs: _Graphs, shipped: GreedyDecoder, tasks: list[TaskFolder]) -> Agreement:
    texts = [
        (shipped.prompt(task.spec, dict(example.event)), shipped.answer_ids(dict(example.decision)))
        for task in tasks
        for example in task.golden[:MAX_PARITY_TEXTS]
    ]
    if not texts:
        # Without golden examples the prefixes are all that is known of the input.
        texts = [([1, 2, 3], shipped.answer_ids({"text": task.spec.prompt.prefix})) for task in tasks]
    return between(StepModel(graphs.fp32, graphs.spec), StepModel(graphs.shipped, graphs.spec), texts)


def _pack(
    request: BuildRequest,
    checkpoint: Checkpoint,
    tasks: list[TaskFolder],
    spec: ModelSpec,
    report: dict[str, Any],
    folder: Path,
) -> Manifest:
    write_file(folder, REPORT_JSON, report_json_bytes(report))
    write_file(folder, REPORT_HTML, report_html_bytes(report))
    files = list_files(folder)
    disk_bytes = sum(entry.size for entry in files)
    try:
        manifest = Manifest.model_validate(
            {
                "name": request.identity.name,
                "version": request.identity.version,
                "target": request.identity.target,
                "model": spec,
                "tasks": tuple(task.spec.name for task in tasks),
                "files": files,
                "minimum_runtime": MINIMUM_RUNTIME,
                "resources": Resources(disk_bytes=disk_bytes, ram_bytes=_ram_bytes(spec, disk_bytes)),
                "quality": report["quality"],
                "provenance": {
                    "checkpoint": _checkpoint_facts(checkpoint),
                    "precision": spec.precision,
                    "tools": report["tools"],
                },
            }
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RefusedError("export.manifest_invalid", faults) from error
    write_manifest(folder, manifest)
    return manifest


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "sha256": checkpoint.sha256,
        "files": dict(sorted(checkpoint.file_hashes.items())),
        "architecture": checkpoint.architecture,
        "parameters": checkpoint.parameters,
    }


def _ram_bytes(spec: ModelSpec, disk_bytes: int) -> int:
    """Estimate for the worker: libraries, weights twice (file and prepacked), caches at full context."""
    kv_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * spec.max_context_tokens * 4
    return RUNTIME_BASE_BYTES + 2 * disk_bytes + 2 * kv_bytes


def _check_measurement(measurement: Measurement, tasks: list[TaskFolder]) -> None:
    known = {task.spec.name for task in tasks}
    for name in {*measurement.calibrate_on, *measurement.evaluate_on, *measurement.quality}:
        if name not in known:
            raise RefusedError("export.task_unknown", f"no task {name!r} among: {', '.join(sorted(known))}")


def read_quality(path: Path) -> dict[str, Any]:
    """Read figures for `Measurement.quality`.

    Raises:
        PermanentError: ``export.quality_invalid``.
    """
    try:
        parsed = json.loads(path.read_text("utf-8"))
        if not all(isinstance(f["accuracy"], dict) and "ece" in f for by in parsed.values() for f in by.values()):
            raise ValueError("figures lack accuracy or ece")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PermanentError("export.quality_invalid", f"{path}: {error}") from error
    result: dict[str, Any] = parsed
    return result
