"""What is put together into a bundle's folder, and the manifest that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent.contract.document import DocumentError, read_document
from edge_agent.contract.manifest import Manifest, ModelSpec, Resources
from edge_agent.errors import RefusedError
from export.bundle import list_files, tool_versions, write_file, write_manifest
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.checkpoint.token_table import UnsuitableTokenizerError, token_table
from export.request import Identity
from export.stages.layout import MODEL_DIR, TOKEN_TABLE, read_spec
from export.tasks import TaskFolder

RUNTIME_BASE_BYTES = 120 << 20

Place = Callable[[Path, Path], None]
"""Brings a file of an earlier stage to its place: a copy that survives a power cut, or a link for a look."""


@dataclass(frozen=True)
class Parts:
    """A bundle's ingredients.

    Args:
        identity: name, version, target.
        checkpoint: where the weights came from.
        tasks: the tasks.
        model: folder with ``model/…``, ``spec.json`` and the adapters that it names.
        minimum_onnxruntime: oldest version that runs the graphs.
        quality: figures for the manifest.
        findings: what stages found out, for the report card.
        lineage: how the checkpoint came from a larger one, step by step; usually empty.
        texts: small files made by the build, by path inside the bundle: calibration, report card.
    """

    identity: Identity
    checkpoint: Checkpoint
    tasks: tuple[TaskFolder, ...]
    model: Path
    quality: Mapping[str, Any]
    minimum_onnxruntime: str = "1.32.0"
    findings: Mapping[str, Any] = field(default_factory=dict)
    lineage: tuple[Mapping[str, Any], ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)


def assemble(parts: Parts, folder: Path, place: Place) -> Manifest:
    """Bring everything to its place and write the manifest, last of all.

    Args:
        parts: the ingredients.
        folder: an empty folder.
        place: how large files are brought.

    Raises:
        RefusedError: ``export.manifest_invalid``.
        EdgeError: ``disk.*``.
    """
    spec = read_spec(parts.model)
    for file in sorted((parts.model / MODEL_DIR).iterdir()):
        target = folder / MODEL_DIR / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        place(file, target)
    for name in (spec.adapters or {}).values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        place(parts.model / name, folder / name)
    place(parts.checkpoint.path / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    if table := table_of(parts.checkpoint):
        write_file(folder, TOKEN_TABLE, table)
        spec = replace(spec, token_table=TOKEN_TABLE)
    for task in parts.tasks:
        for name, source in task.files().items():
            write_file(folder, name, source.read_bytes())
    for name, content in parts.texts.items():
        write_file(folder, name, content)
    manifest = _manifest(parts, spec, folder)
    write_manifest(folder, manifest)
    return manifest


def table_of(checkpoint: Checkpoint) -> bytes | None:
    """The tokenizer as a table; None where it has no need of one, or cannot be one."""
    try:
        return token_table(checkpoint.path / TOKENIZER_NAME, checkpoint.file_hashes[TOKENIZER_NAME])
    except UnsuitableTokenizerError:
        return None


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the weights came from, for manifest and report card."""
    return {
        "sha256": checkpoint.sha256,
        "files": dict(sorted(checkpoint.file_hashes.items())),
        "architecture": checkpoint.architecture,
        "parameters": checkpoint.parameters,
    }


def _manifest(parts: Parts, spec: ModelSpec, folder: Path) -> Manifest:
    files = list_files(folder)
    disk_bytes = sum(entry.size for entry in files)
    try:
        return read_document(
            Manifest,
            {
                "name": parts.identity.name,
                "version": parts.identity.version,
                "target": parts.identity.target,
                "model": spec,
                "tasks": tuple(task.spec.name for task in parts.tasks),
                "files": files,
                "minimum_runtime": {"onnxruntime": parts.minimum_onnxruntime},
                "resources": Resources(disk_bytes=disk_bytes, ram_bytes=ram_bytes(spec, disk_bytes)),
                "quality": parts.quality,
                "provenance": {
                    "checkpoint": checkpoint_facts(parts.checkpoint),
                    "precision": spec.precision,
                    "tools": tool_versions(),
                    **({"lineage": list(parts.lineage)} if parts.lineage else {}),
                },
            },
        )
    except DocumentError as error:
        raise RefusedError("export.manifest_invalid", str(error)) from error


def ram_bytes(spec: ModelSpec, disk_bytes: int) -> int:
    """Estimate for the worker: libraries, weights twice (file and prepacked), caches at full context."""
    element_bytes = {"float32": 4, "float16": 2, "int8": 1}[spec.kv_dtype]
    kv_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * spec.max_context_tokens * element_bytes
    return RUNTIME_BASE_BYTES + 2 * disk_bytes + 2 * kv_bytes
