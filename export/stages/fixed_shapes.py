"""Stage *specialise* for accelerators: every shape fixed, and for Qualcomm's NPU compiled for one chip."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime

from edge_agent.errors import RefusedError
from export.boards import Board, Soc
from export.checkpoint.source import Checkpoint
from export.npu.static_graph import StaticShape, build_windows
from export.npu.windows import PRECISIONS, StaticModel, compile_windows, quantise_windows
from export.pipeline import Progress
from export.proof.evidence import Evidence
from export.stages.layout import MODEL_DIR, write_spec
from export.stages.specialise import ACTIVATION_TEXTS, Speciality


def fix_shapes(
    speciality: Speciality, portable: Path, precision: str, soc: Soc | None, folder: Path, progress: Progress
) -> None:
    """Build static windows, and what the target makes of them.

    Args:
        speciality: target, checkpoint, tasks.
        portable: the portable fp32 graph.
        precision: ``fp32``, or a fixed-point one.
        soc: the chip to compile for; None where the target compiles on the device.
        folder: receives ``model/`` and ``spec.json``.
        progress: is told of every step.

    Raises:
        EdgeError: ``export.static_shape``, ``export.calibration_missing``, ``export.npu_*``.
    """
    board = speciality.board
    shape = shape_for(board, speciality.checkpoint)
    with TemporaryDirectory(dir=folder) as scratch:
        full = Path(scratch) / "fp32"
        model = StaticModel(full, build_windows(speciality.checkpoint, portable, shape, full))
        progress.line(f"static windows of {', '.join(map(str, shape.windows))} tokens, {shape.past_tokens} of past")
        if precision != "fp32":
            texts = speciality.texts.calibration(ACTIVATION_TEXTS)
            model = quantise_windows(model, texts, PRECISIONS[precision], Path(scratch) / "fixed")
            progress.line(f"{precision}: ranges of every tensor from {len(texts)} texts")
        if soc is not None:
            model = compile_windows(model, soc, Path(scratch) / "compiled", progress.line)
        shutil.copytree(model.folder / MODEL_DIR, folder / MODEL_DIR)
    write_spec(folder, model.spec)


def shape_for(board: Board, checkpoint: Checkpoint) -> StaticShape:
    """The target's shape, or less where the model itself looks back less far."""
    reach = min(checkpoint.max_positions, int(checkpoint.config.get("sliding_window") or checkpoint.max_positions))
    past_tokens = min(board.past_tokens or reach, reach)
    return StaticShape(past_tokens, tuple(tokens for tokens in board.window_tokens if tokens <= past_tokens))


def chosen_soc(board: Board, name: str | None) -> Soc | None:
    """The chip to compile for: the named one, else the target's first; None for targets without any.

    Raises:
        RefusedError: ``export.soc_unknown``.
    """
    if name is None:
        return board.socs[0] if board.socs else None
    for soc in board.socs:
        if soc.name == name:
            return soc
    known = ", ".join(soc.name for soc in board.socs) or "none"
    raise RefusedError("export.soc_unknown", f"{board.name} has no chip {name!r}; it has: {known}")


def compiled_for(board: Board, soc: Soc) -> Evidence:
    """That the vendor's compiler took every graph whole."""
    return Evidence(
        target=board.name,
        machine=platform.machine(),
        onnxruntime=onnxruntime.__version__,
        device=soc.name,
        compiler=board.compilers[0],
    )
