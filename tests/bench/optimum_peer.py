"""The other peer: optimum's graph of a checkpoint, quantised by onnxruntime's MatMulNBits quantiser.

    python -m tests.bench.optimum_peer CHECKPOINT OUT_FOLDER

What one gets by following both projects' documentation, with the options that make it fastest on a CPU: symmetric
blocks of 32 and accuracy level 4. Nothing of this repository is used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path

# Before onnxruntime is imported: its official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from optimum.exporters.onnx import main_export

GRAPH = "model.onnx"
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4


def write_optimum(checkpoint: Path, out: Path) -> int:
    """Export and quantise.

    Args:
        checkpoint: Hugging Face folder.
        out: folder for ``model.onnx`` and ``model.onnx.data``.

    Returns:
        Bytes of the quantised graph.
    """
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        main_export(
            str(checkpoint), scratch, task="text-generation-with-past", local_files_only=True, do_validation=False
        )
        model = onnx.load(str(Path(scratch) / GRAPH))
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL)
    quantizer = MatMulNBitsQuantizer(
        model, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, algo_config=config
    )
    logging.getLogger().setLevel(logging.WARNING)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / GRAPH), use_external_data_format=True)
    return sum(file.stat().st_size for file in out.iterdir() if file.is_file())


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring); prints what was written as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.optimum_peer")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    print(json.dumps({"file_bytes": write_optimum(arguments.checkpoint, arguments.out)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
