"""Stage *quantise*: from fp32 weights to INT4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.graph import load_graph, save_graph
from export.pipeline import Progress
from export.quantize import QuantSettings, quantize_int4
from export.stages.layout import DECODER, read_spec, write_spec


def quantise(
    fused: Path, settings: QuantSettings, texts: Sequence[Sequence[int]], folder: Path, progress: Progress
) -> None:
    """Quantise the fused graph.

    Args:
        fused: outputs of stage *fuse*.
        settings: how.
        texts: token ids of the tasks' prompts with their answers, for calibrated methods.
        folder: receives ``model/decoder.onnx`` and ``spec.json``.
        progress: is told the size.

    Raises:
        EdgeError: ``export.block_size``, ``export.quantize_failed``, …
    """
    model = quantize_int4(load_graph(fused / DECODER), settings, calibration_ids=texts)
    files = save_graph(model, folder / DECODER)
    write_spec(folder, read_spec(fused).model_copy(update={"precision": settings.label}))
    progress.line(f"{settings.label} graph: {sum(file.stat().st_size for file in files):,} bytes")
