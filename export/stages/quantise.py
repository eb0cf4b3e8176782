"""Stage *quantise*: from fp32 weights to INT4, with eight bits where four hurt; or to eight bits by rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import ModelProto

from export.graphs.graph import load_graph, save_graph
from export.pipeline import Progress
from export.quantisation.int8_rows import LABEL, quantise_rows
from export.quantisation.quantize import QuantSettings, quantize_int4
from export.quantisation.sensitivity import choose_int8, measure_sensitivity
from export.stages.layout import DECODER, SENSITIVITY_NAME, read_spec, write_spec
from export.texts import TaskTexts


def quantise(
    fused: Path, settings: QuantSettings, int8_share: float, texts: TaskTexts, folder: Path, progress: Progress
) -> None:
    """Quantise the fused graph to INT4.

    Args:
        fused: outputs of stage *fuse*.
        settings: how.
        int8_share: share of the weights that may keep eight bits, where it helps most; 0: none.
        texts: the tasks' own, to calibrate on and to measure sensitivity on.
        folder: receives ``model/decoder.onnx``, ``spec.json`` and, if measured, ``sensitivity.json``.
        progress: is told the size.

    Raises:
        EdgeError: ``export.block_size``, ``export.calibration_missing``, ``export.quantize_failed``, …
    """
    model = load_graph(fused / DECODER)
    if int8_share:
        found = measure_sensitivity(model, texts.golden(), settings, progress.line)
        settings = replace(settings, int8_nodes=choose_int8(found, int8_share))
        facts = [one.as_dict(settings.int8_nodes) for one in found]
        (folder / SENSITIVITY_NAME).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    _finish(fused, _int4(model, settings, texts), settings.label, folder, progress)


def quantise_int8(fused: Path, settings: QuantSettings, texts: TaskTexts, folder: Path, progress: Progress) -> None:
    """Quantise the fused graph's projections to eight bits by rows, embedding and head to INT4.

    Args:
        fused: outputs of stage *fuse*.
        settings: how embedding and head are quantised.
        texts: the tasks' own, to calibrate on.
        folder: receives ``model/decoder.onnx`` and ``spec.json``.
        progress: is told the size.

    Raises:
        EdgeError: ``export.block_size``, ``export.calibration_missing``, ``export.quantize_failed``, …
    """
    model = load_graph(fused / DECODER)
    quantise_rows(model)
    _finish(fused, _int4(model, settings, texts), LABEL, folder, progress)


def _int4(model: ModelProto, settings: QuantSettings, texts: TaskTexts) -> ModelProto:
    return quantize_int4(model, settings, calibration_ids=texts.calibration() if settings.needs_texts else ())


def _finish(fused: Path, model: ModelProto, label: str, folder: Path, progress: Progress) -> None:
    files = save_graph(model, folder / DECODER)
    write_spec(folder, replace(read_spec(fused), precision=label))
    progress.line(f"{label} graph: {sum(file.stat().st_size for file in files):,} bytes")


def sensitivity_facts(folder: Path) -> dict[str, Any]:
    """``{"sensitivity": …}`` for the report card where it was measured, else nothing."""
    file = folder / SENSITIVITY_NAME
    return {"sensitivity": json.loads(file.read_text("utf-8"))} if file.is_file() else {}
