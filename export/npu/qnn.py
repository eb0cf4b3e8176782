"""Compiles fixed-point graphs for Qualcomm's NPU (Hexagon Tensor Processor), and says what it could not take.

The compiler is part of the package ``onnxruntime-qnn``; on x86-64 it compiles for chips that are not there. What comes
out is a small ONNX graph around one EPContext node, which holds the NPU's program; what stays beside that node would
run on the gateway's CPU, number by number copied back and forth, so a graph with anything but the conversion of its
own inputs and outputs left over is refused, with every operator and its layer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from edge_agent.errors import PermanentError
from export.boards import Soc
from export.npu import qnn_compiler

TIMEOUT_S = 1800.0
CONTEXT_OP = "EPContext"

_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LAYER = re.compile(r"layers\.(\d+)[./]([^./]+)")
_LAST_WORDS = 600


@dataclass(frozen=True)
class Leftover:
    """An operator that the compiler did not take.

    Args:
        op: its type.
        node: its name.
        layer: where in the model: ``layer 3, self_attn``, or ``outside the layers``.
    """

    op: str
    node: str
    layer: str

    def __str__(self) -> str:
        return f"{self.op} in {self.layer} ({self.node})"


def compile_graph(source: Path, soc: Soc, target: Path) -> None:
    """Compile one static graph.

    In a process of its own: the compiler numbers graphs across a process and writes the numbers into its output, so
    that only the first graph of a process has reproducible bytes; and what it allocates or breaks is gone with it.

    Args:
        source: a graph of `export.npu.qdq.to_fixed_point`.
        soc: the chip.
        target: the compiled graph, one file.

    Raises:
        PermanentError: ``export.npu_missing`` without the compiler, ``export.npu_failed`` when it fails,
            ``export.npu_unsupported`` naming every operator that it does not take.
    """
    request = {
        "source": str(source.resolve()),
        "target": str(target.resolve()),
        "htp_arch": soc.htp_arch,
        "soc_model": soc.soc_model,
    }
    done = subprocess.run(
        [sys.executable, "-m", qnn_compiler.__name__],
        input=json.dumps(request),
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode == 2:
        raise PermanentError("export.npu_missing", "the compiler is not there: pip install 'edge-agent[npu]'")
    if done.returncode:
        said = done.stderr.strip()[-_LAST_WORDS:]
        raise PermanentError("export.npu_failed", f"compiling {source.name} for {soc.name} failed: {said}")
    model = ModelProto()
    model.ParseFromString(target.read_bytes())
    left = leftovers(model)
    if left:
        target.unlink()
        raise PermanentError(
            "export.npu_unsupported",
            f"{soc.name} cannot run {len(left)} operator(s) of {source.name}: {'; '.join(map(str, left[:8]))}",
            operators=[str(one) for one in left],
        )


def leftovers(compiled: ModelProto) -> list[Leftover]:
    """Operators of a compiled graph that would not run on the NPU.

    Conversions of the graph's own inputs and outputs between fp32 and integers are not counted: ONNX Runtime leaves
    them to the CPU on purpose, which has the fp32 numbers at hand.
    """
    inputs = {value.name for value in compiled.graph.input}
    outputs = {value.name for value in compiled.graph.output}
    left = []
    for node in compiled.graph.node:
        at_border = bool(inputs & set(node.input) or outputs & set(node.output))
        if node.op_type == CONTEXT_OP or (node.op_type in _CONVERSIONS and at_border):
            continue
        left.append(Leftover(node.op_type, node.name, layer_of(node.name)))
    # Conversions in the middle are there because of an operator beside them, which is the one to name.
    return [one for one in left if one.op not in _CONVERSIONS] or left


def layer_of(node: str) -> str:
    """Where in the model a node is, read off the name that it has had since the export from torch."""
    found = _LAYER.search(node)
    return f"layer {found[1]}, {found[2]}" if found else "outside the layers"
