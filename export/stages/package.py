"""Stage *package*: report card, manifest, signature; the bundle appears whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.contract.manifest import Manifest
from edge_agent.fs import copy_durable
from export.assembly import Parts, assemble, checkpoint_facts, table_of
from export.bundle import fresh_directory, tool_versions
from export.card.report import REPORT_HTML, REPORT_JSON, report_html_bytes, report_json_bytes, size_by_part
from export.checkpoint.source import TOKENIZER_NAME
from export.graphs.graph import load_graph, stored_with_others
from export.proof.evaluate import without_curves
from export.signing import sign_bundle
from export.stages.layout import MODEL_DIR, PROOF_NAME, read_spec
from export.stages.prove import calibration_texts
from export.stages.specialise import vocabulary_facts


def package(
    parts: Parts, proven: Path, out: Path, key: Ed25519PrivateKey, *, force: bool
) -> tuple[str, Manifest, dict[str, Any]]:
    """Put the bundle together, sign it and let it appear.

    Args:
        parts: the ingredients, without calibration and report card.
        proven: outputs of stage *prove*.
        out: the bundle's directory.
        key: signs the manifest.
        force: whether an existing bundle is replaced.

    Returns:
        Digest, manifest and report.

    Raises:
        EdgeError: ``export.out_exists``, ``export.manifest_invalid``, ``disk.*``.
    """
    calibration = calibration_texts(proven)
    report = _report(parts, proven, calibration)
    texts = {**calibration, REPORT_JSON: report_json_bytes(report), REPORT_HTML: report_html_bytes(report)}
    with fresh_directory(out, force=force) as folder:
        whole = replace(parts, texts=texts, quality=without_curves(report["quality"]))
        manifest = assemble(whole, folder, copy_durable)
        digest = sign_bundle(folder, key)
    return digest, manifest, report


def _report(parts: Parts, proven: Path, calibration: dict[str, bytes]) -> dict[str, Any]:
    proof = json.loads((proven / PROOF_NAME).read_text("utf-8"))
    identity, spec = parts.identity, read_spec(parts.model)
    vocabulary = vocabulary_facts(parts.model)
    table = table_of(parts.checkpoint) or b""
    graphs = [parts.model / name for name in spec.graph_files]
    decoder, *others = map(load_graph, graphs)
    free = frozenset().union(*map(stored_with_others, graphs))
    model_bytes = sum(file.stat().st_size for file in (parts.model / MODEL_DIR).iterdir())
    return {
        "format": 1,
        "bundle": {"name": identity.name, "version": identity.version, "target": identity.target},
        "precision": spec.precision,
        "verification": proof["verification"],
        "evidence": proof["evidence"],
        "size_bytes": {
            **size_by_part(decoder, model_bytes, *others, free=free),
            "tokenizer": (parts.checkpoint.path / TOKENIZER_NAME).stat().st_size + len(table),
        },
        "checkpoint": checkpoint_facts(parts.checkpoint),
        "tools": tool_versions(),
        "parity": proof["parity"],
        **({"vocabulary": vocabulary} if vocabulary else {}),
        **({"lineage": list(parts.lineage)} if parts.lineage else {}),
        **parts.findings,
        **_calibrations(parts, calibration),
        "quality": proof["quality"],
    }


def _calibrations(parts: Parts, fitted: dict[str, bytes]) -> dict[str, Any]:
    """Calibrations by task: those fitted by this build, else those that came with the task."""
    given = {name: file.read_bytes() for task in parts.tasks for name, file in task.calibration().items()}
    read = {name.split("/")[1]: json.loads(content) for name, content in sorted({**given, **fitted}.items())}
    floors = {task: one["floors"] for task, one in read.items() if one.get("floors")}
    lines = {
        task: {name: len(line["raw"]) for name, line in one["knots"].items()}
        for task, one in read.items()
        if one.get("knots")
    }
    return {
        "calibration": {task: one.get("temperature", {}) for task, one in read.items()},
        **({"floors": floors} if floors else {}),
        **({"lines": lines} if lines else {}),
    }
