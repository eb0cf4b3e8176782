"""The stages of ``edge-export build``: check, build, hold against the original, quantise, measure, pack, sign."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import ModelProto
from pydantic import TypeAdapter, ValidationError

from edge_agent.contract.manifest import Manifest, ModelSpec, Name, Resources, read_manifest
from edge_agent.contract.task import GoldenExample
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import copy_durable
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.boards import buildable_board
from export.bundle import check_out, fresh_directory, list_files, tool_versions, write_file, write_manifest
from export.calibrate import CALIBRATION_NAME, calibration_bytes, fit_temperatures
from export.evaluate import evaluate, greedy_backend, read_labelled
from export.graph import build_fp32, graph_shape, save_graph
from export.greedy import GreedyDecoder, StepModel
from export.measure import DEADLINE_S, THREADS, read_temperatures
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
_NAME: TypeAdapter[str] = TypeAdapter(Name)


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
    quantisation: QuantSettings = field(default_factory=QuantSettings)
    max_context_tokens: int = 2048
    measurement: Measurement = field(default_factory=Measurement)


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


@dataclass(frozen=True)
class _Labelled:
    """Labelled events of one task."""

    calibrate_on: list[GoldenExample]
    evaluate_on: list[GoldenExample]


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
    _check_identity(request.identity)
    buildable_board(request.identity.target)
    checkpoint = open_checkpoint(request.checkpoint)
    context = min(checkpoint.max_positions, request.max_context_tokens)
    tasks = open_tasks(request.tasks, context)
    labelled = _read_labelled(request.measurement, tasks)
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
        report = _facts(request, checkpoint, graphs, folder)
        report["parity"] = _parity(request, tasks, graphs, folder, log)
        report["calibration"] = _calibrate(tasks, labelled, graphs, folder, log)
        report["quality"] = _quality(request, tasks, labelled, graphs, folder, log)
        manifest = _pack(request, checkpoint, tasks, graphs.spec, report, folder)
        _answer_golden(folder, log)
        digest = sign_bundle(folder, key)
    log(f"bundle: {manifest.size_bytes:,} bytes in {len(manifest.files)} files, digest {digest}")
    return BuildResult(digest, manifest, report)


def _check_identity(identity: Identity) -> None:
    for what, value in (("name", identity.name), ("version", identity.version)):
        try:
            _NAME.validate_python(value)
        except ValidationError as error:
            raise RefusedError("export.name_invalid", f"{what} {value!r}: {error.errors()[0]['msg']}") from error


def _build_graphs(
    request: BuildRequest, checkpoint: Checkpoint, context: int, scratch: Path, folder: Path, log: Log
) -> _Graphs:
    model = build_fp32(checkpoint, context)
    fp32_path = scratch / "fp32.onnx"
    save_graph(model, fp32_path)
    precision = "fp32" if request.precision == "fp32" else request.quantisation.label
    spec = _model_spec(checkpoint, model, context, precision)
    parity = against_transformers(checkpoint, StepModel(fp32_path, spec, threads=THREADS))
    log(f"fp32 graph: logits within {parity.max_abs_diff:.2e} of transformers at {parity.positions} positions")
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


def _facts(request: BuildRequest, checkpoint: Checkpoint, graphs: _Graphs, folder: Path) -> dict[str, Any]:
    identity = request.identity
    graph_bytes = sum(file.stat().st_size for file in graphs.shipped.parent.iterdir())
    return {
        "format": 1,
        "bundle": {"name": identity.name, "version": identity.version, "target": identity.target},
        "precision": graphs.spec.precision,
        "verification": buildable_board(identity.target).verification,
        "size_bytes": {
            **size_by_part(graphs.shipped_model, graph_bytes),
            "tokenizer": (folder / TOKENIZER_NAME).stat().st_size,
        },
        "checkpoint": _checkpoint_facts(checkpoint),
        "tools": tool_versions(),
    }


def _parity(request: BuildRequest, tasks: list[TaskFolder], graphs: _Graphs, folder: Path, log: Log) -> dict[str, Any]:
    # The difference itself is left out: it depends on the machine, that it is small enough does not.
    parity: dict[str, Any] = {"fp32_matches_transformers": True}
    if request.precision == "int4":
        agreement = _agreement(graphs, _decoder(graphs.shipped, graphs, folder), tasks)
        parity["int4_against_fp32"] = agreement.as_dict()
        log(f"int4 graph: same top token as fp32 at {agreement.same_top1} of {agreement.positions} positions")
    return parity


def _calibrate(
    tasks: list[TaskFolder], labelled: dict[str, _Labelled], graphs: _Graphs, folder: Path, log: Log
) -> dict[str, dict[str, float]]:
    for task in tasks:
        name, rows = task.spec.name, labelled[task.spec.name].calibrate_on
        if rows:
            found = fit_temperatures(_decoder(graphs.shipped, graphs, folder), task.spec, rows)
            write_file(folder, f"tasks/{name}/{CALIBRATION_NAME}", calibration_bytes(found))
            log(f"{name}: temperatures {found} from {len(rows)} events")
    temperatures = {task.spec.name: read_temperatures(folder, task.spec.name) for task in tasks}
    return {name: found for name, found in temperatures.items() if found}


def _quality(
    request: BuildRequest,
    tasks: list[TaskFolder],
    labelled: dict[str, _Labelled],
    graphs: _Graphs,
    folder: Path,
    log: Log,
) -> dict[str, Any]:
    quality: dict[str, Any] = {name: dict(figures) for name, figures in request.measurement.quality.items()}
    for task in tasks:
        name, rows = task.spec.name, labelled[task.spec.name].evaluate_on
        for precision, graph in {"fp32": graphs.fp32, request.precision: graphs.shipped}.items() if rows else ():
            temperatures = read_temperatures(folder, name) if graph == graphs.shipped else None
            found = evaluate(greedy_backend(_decoder(graph, graphs, folder), task.spec, temperatures), rows, task.spec)
            quality.setdefault(name, {})[precision] = found.as_dict()
            log(f"{name}: {precision} right in every field for {found.exact:.2%} of {found.rows} events")
    return quality


def _decoder(graph: Path, graphs: _Graphs, folder: Path) -> GreedyDecoder:
    return GreedyDecoder(graph, folder / TOKENIZER_NAME, graphs.spec, threads=THREADS)


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


def _answer_golden(folder: Path, log: Log) -> None:
    """Load the bundle with the device's engine and refuse what a device's trial would refuse."""
    engine = Engine(open_installed_bundle(folder, read_manifest(folder)[1]), THREADS)
    total = 0
    for name in engine.tasks:
        for number, example in enumerate(engine.golden(name), start=1):
            total += 1
            # Without the task's deadline: a busy build machine says nothing about a device's speed.
            answer = engine.decide(name, dict(example.event), deadline_s=DEADLINE_S)
            if answer.decision != example.decision:
                raise RefusedError(
                    "export.golden_failed",
                    f"golden example {number} of task {name!r} is answered {answer.decision}, not {example.decision}",
                )
    log(f"engine: {total} golden examples answered as they must be")


def _read_labelled(measurement: Measurement, tasks: list[TaskFolder]) -> dict[str, _Labelled]:
    """Read all labelled events before the long work begins."""
    known = {task.spec.name for task in tasks}
    for name in {*measurement.calibrate_on, *measurement.evaluate_on, *measurement.quality}:
        if name not in known:
            raise RefusedError("export.task_unknown", f"no task {name!r} among: {', '.join(sorted(known))}")

    def rows(files: dict[str, Path], task: TaskFolder) -> list[GoldenExample]:
        file = files.get(task.spec.name)
        return read_labelled(file, task.spec) if file else []

    return {t.spec.name: _Labelled(rows(measurement.calibrate_on, t), rows(measurement.evaluate_on, t)) for t in tasks}


def read_quality(path: Path) -> dict[str, Any]:
    """Read figures for `Measurement.quality`.

    Raises:
        PermanentError: ``export.quality_invalid``.
    """
    try:
        parsed = json.loads(path.read_text("utf-8"))
        complete = all(set(f["accuracy"]) == set(f["ece"]) and f["rows"] for by in parsed.values() for f in by.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PermanentError("export.quality_invalid", f"{path}: {error}") from error
    if not complete:
        raise PermanentError("export.quality_invalid", f"{path}: accuracy, ece and rows are needed")
    result: dict[str, Any] = parsed
    return result
