"""A static fp32 graph in fixed point: 16-bit activations, 8- or 4-bit weights, as pairs that quantise and dequantise.

Accelerators compute in integers whose scales are fixed when the graph is compiled. Every tensor between two operators
gets the scale of what was seen there on the task's own prompts; the compiler folds an operator and the pairs around it
into one integer operator. Weights of projections have one scale per output channel, or per block of a channel;
everything else has one scale per tensor.

Not by ``onnxruntime.quantization``: it has no 4-bit blocks in the form that Qualcomm's compiler takes, gives moved
tensors (Reshape, Slice, …) scales of their own, and knows nothing of masks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError, RefusedError
from export.graphs.graph import save_graph
from export.npu.static_graph import BIAS

OPSET = 21
"""The first with 16-bit, 4-bit and blocked QuantizeLinear."""
IR_VERSION = 10
LEVELS = 65535
MARGIN = 0.1
"""Ranges are widened by this share on either side: unseen prompts reach further than those of the calibration."""
HIDDEN_BELOW = 16.0
"""How far masked scores end below every other: e^-16 is one part in nine million."""
SMALLEST_RANGE = 1e-4

Feeds = Mapping[str, npt.NDArray[Any]]
Ranges = dict[str, tuple[float, float]]
Floats = npt.NDArray[np.float32]

_MOVES = frozenset({"Reshape", "Transpose", "Slice", "Unsqueeze", "Squeeze", "Expand", "Gather"})
"""Operators that only move numbers: what comes out has the scale of what went in."""


@dataclass(frozen=True)
class FixedPoint:
    """How weights are stored.

    Args:
        weight_bits: of the projections.
        block_size: input weights of a channel that share a scale; 0: the whole channel.
        head_bits: of the output head, whose rounding errors nothing after it evens out.
    """

    weight_bits: Literal[4, 8] = 8
    block_size: int = 0
    head_bits: Literal[4, 8] = 8

    @property
    def precision(self) -> str:
        """As manifests and targets name it."""
        return f"a16w{self.weight_bits}"


def observe(model: ModelProto, feeds: Iterable[Feeds], threads: int = 1) -> Ranges:
    """Run a graph and note the smallest and largest value of every tensor between operators.

    Args:
        model: a static fp32 graph.
        feeds: inputs of each pass.
        threads: intra-op threads.

    Returns:
        (smallest, largest) by tensor name, graph inputs included.

    Raises:
        RefusedError: ``export.calibration_missing`` without a pass.
    """
    probe = ModelProto()
    probe.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output]
    del probe.graph.output[:]
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            probe.graph.node.append(helper.make_node(op, [name], [f"{name}.{op}"], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(f"{name}.{op}", TensorProto.FLOAT, []))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="edge-export-") as scratch:
        # By way of the disk: a graph in memory may not exceed 2 GB.
        save_graph(probe, Path(scratch) / "probe.onnx")
        del probe
        session = ort.InferenceSession(str(Path(scratch) / "probe.onnx"), options, providers=["CPUExecutionProvider"])
    ranges: Ranges = {}
    for feed in feeds:
        found = np.array(session.run(None, dict(feed)), np.float64).reshape(-1, 2)  # [tensors, (smallest, largest)]
        seen = [(name, float(low), float(high)) for name, (low, high) in zip(names, found, strict=True)]
        seen += [(name, float(x.min()), float(x.max())) for name, x in feed.items() if x.dtype == np.float32]
        for name, low, high in seen:
            old = ranges.get(name, (low, high))
            ranges[name] = (min(old[0], low), max(old[1], high))
    if not ranges:
        raise RefusedError("export.calibration_missing", "there is no text to calibrate the fixed-point graph on")
    return ranges


def to_fixed_point(model: ModelProto, ranges: Ranges, how: FixedPoint) -> ModelProto:
    """Put a graph into fixed point.

    Args:
        model: a static fp32 graph; consumed.
        ranges: of `observe`, on this graph or one with the same tensors.
        how: the weights.

    Returns:
        The same inputs and outputs in fp32, everything between in QDQ pairs.

    Raises:
        PermanentError: ``export.graph_unexpected`` when the graph has a tensor that was never observed.
    """
    return _Conversion(model, _tied(model, _unmasked(model, ranges)), how).convert()


@dataclass(frozen=True)
class Scale:
    """Affine quantisation of a tensor to uint16: real = scale * (q - zero_point)."""

    scale: float
    zero_point: int

    @classmethod
    def covering(cls, low: float, high: float) -> Scale:
        """The scale of a range. Zero is always exactly representable: padding and masks depend on it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(high - low, SMALLEST_RANGE) / LEVELS
        return cls(scale, int(np.clip(round(-low / scale), 0, LEVELS)))


def _unmasked(model: ModelProto, ranges: Ranges) -> Ranges:
    """Ranges of the scores that count: what the mask hides need only end far enough below them."""
    narrowed = {
        name: (low - MARGIN * max(high - low, 0.0) * (low < 0), high + MARGIN * (high - low))
        for name, (low, high) in ranges.items()
    }
    for node in model.graph.node:
        if BIAS in node.input:
            scores = next(name for name in node.input if name != BIAS)
            low, high = _observed(narrowed, scores)
            narrowed[node.output[0]] = (low - HIDDEN_BELOW, high)
    return {**narrowed, BIAS: _observed(ranges, BIAS)}


def _observed(ranges: Ranges, name: str) -> tuple[float, float]:
    if name not in ranges:
        raise PermanentError("export.graph_unexpected", f"the graph that was calibrated has no tensor {name}")
    return ranges[name]


def _tied(model: ModelProto, ranges: Ranges) -> Ranges:
    """One range for all tensors that hold the same numbers."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    known = dict(ranges)
    for node in model.graph.node:
        if node.op_type in _MOVES:
            source = node.input[0]
            if source in weights:
                table = numpy_helper.to_array(weights[source])
                known[source] = (float(table.min()), float(table.max()))
            leader[find(node.output[0])] = find(source)
        elif node.op_type == "Concat" and any(name.startswith("past_key_values.") for name in node.input):
            for name in node.input:
                leader[find(name)] = find(node.output[0])
    whole: Ranges = {}
    for name, (low, high) in known.items():
        old = whole.get(find(name), (low, high))
        whole[find(name)] = (min(old[0], low), max(old[1], high))
    return {**known, **{name: whole[find(name)] for name in known}}


class _Conversion:
    """One graph on its way; a fresh list of nodes is built in the order of the old."""

    def __init__(self, model: ModelProto, ranges: Ranges, how: FixedPoint) -> None:
        self._model = model
        self._ranges = ranges
        self._how = how
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {output.name for output in model.graph.output}
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._ready: dict[str, str] = {}  # tensor of the old graph -> its dequantised form in the new one

    def convert(self) -> ModelProto:
        graph = self._model.graph
        for value in graph.input:
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                self._pair(value.name, value.name, f"{value.name}.dequantized")
        for node in graph.node:
            self._convert_node(node)
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._constants)
        del self._model.opset_import[:]
        self._model.opset_import.append(helper.make_opsetid("", OPSET))
        self._model.ir_version = IR_VERSION
        return self._model

    def _convert_node(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        for position, name in enumerate(node.input):
            if name in self._weights:
                new.input[position] = self._weight(node, position)
            else:
                new.input[position] = self._ready.get(name, name)
        (name,) = node.output
        new.output[0] = f"{name}.real"
        self._nodes.append(new)
        self._pair(name, new.output[0], name if name in self._outputs else f"{name}.dequantized")

    def _pair(self, name: str, source: str, target: str) -> None:
        """Quantise ``source`` and back, under the range of the tensor ``name``."""
        scale = Scale.covering(*_observed(self._ranges, name))
        constants = [self._constant(f"{name}.scale", np.float32(scale.scale))]
        constants.append(self._constant(f"{name}.zero_point", np.uint16(scale.zero_point)))
        self._nodes.append(
            helper.make_node("QuantizeLinear", [source, *constants], [f"{name}.quantized"], name=f"{name}.quantize")
        )
        self._dequantize(name, f"{name}.quantized", constants, target)

    def _dequantize(self, name: str, quantized: str, constants: list[str], target: str, **attributes: Any) -> None:
        self._nodes.append(
            helper.make_node(
                "DequantizeLinear", [quantized, *constants], [target], name=f"{name}.dequantize", **attributes
            )
        )
        self._ready[name] = target

    def _weight(self, node: NodeProto, position: int) -> str:
        name = str(node.input[position])
        if self._weights[name].data_type != TensorProto.FLOAT:  # shapes, axes, indices
            if name not in self._ready:
                self._constants.append(self._weights[name])
                self._ready[name] = name
            return name
        if name not in self._ready:
            values = numpy_helper.to_array(self._weights[name])
            if node.op_type == "MatMul" and position == 1 and values.ndim == 2:
                self._projection(name, values, self._bits(node))
            else:
                self._table(name, values)
        return self._ready[name]

    def _bits(self, node: NodeProto) -> int:
        return self._how.head_bits if node.output[0] in self._outputs else self._how.weight_bits

    def _table(self, name: str, values: Floats) -> None:
        """A constant in the type of activations: norms, rotary tables, the embedding."""
        scale = Scale.covering(*self._ranges.get(name, (float(values.min()), float(values.max()))))
        whole = np.clip(np.rint(values / scale.scale) + scale.zero_point, 0, LEVELS).astype(np.uint16)
        constants = [self._constant(f"{name}.scale", np.float32(scale.scale))]
        constants.append(self._constant(f"{name}.zero_point", np.uint16(scale.zero_point)))
        self._dequantize(name, self._constant(f"{name}.quantized", whole), constants, f"{name}.dequantized")

    def _projection(self, name: str, values: Floats, bits: int) -> None:
        """Weights [in, out], symmetric."""
        block = self._how.block_size
        if bits == 4 and block and values.shape[0] % block == 0:
            self._blocks(name, values, block)
            return
        top = (1 << (bits - 1)) - 1
        scale = np.maximum(np.abs(values).max(axis=0), SMALLEST_RANGE).astype(np.float32) / np.float32(top)  # [out]
        whole = np.clip(np.rint(values / scale), -top, top).astype(np.int8)
        constants = [self._constant(f"{name}.scale", scale)]
        constants.append(self._integers(f"{name}.zero_point", np.zeros(scale.shape, np.int8), bits))
        self._dequantize(
            name, self._integers(f"{name}.quantized", whole, bits), constants, f"{name}.dequantized", axis=1
        )

    def _blocks(self, name: str, values: Floats, block: int) -> None:
        """Weights [in, out] in blocks: scale of a block = whole number 1..15 times the channel's scale."""
        rows, columns = values.shape
        blocked = values.reshape(rows // block, block, columns)
        wanted = np.maximum(np.abs(blocked).max(axis=1), SMALLEST_RANGE) / 7  # [blocks, out]
        channel = (wanted.max(axis=0) / 15).astype(np.float32)  # [out]
        steps = np.clip(np.ceil(wanted / channel - 1e-3), 1, 15).astype(np.uint8)
        scale = steps.astype(np.float32) * channel
        whole = np.clip(np.rint(blocked / scale[:, None]), -7, 7).astype(np.int8).reshape(rows, columns)
        scales = f"{name}.scales"
        zeros = self._constant(f"{scales}.zero_point", np.zeros(columns, np.uint8))
        self._dequantize(
            scales,
            self._constant(f"{scales}.steps", steps),
            [self._constant(f"{scales}.scale", channel), zeros],
            scales,
            axis=1,
        )
        constants = [scales, self._integers(f"{name}.zero_point", np.zeros(steps.shape, np.int8), 4)]
        self._dequantize(
            name,
            self._integers(f"{name}.quantized", whole, 4),
            constants,
            f"{name}.dequantized",
            axis=0,
            block_size=block,
        )

    def _constant(self, name: str, values: npt.NDArray[Any] | np.generic) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def _integers(self, name: str, values: npt.NDArray[np.int8], bits: int) -> str:
        if bits == 8:
            return self._constant(name, values)
        flat = values.astype(np.uint8).ravel() & 15
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
        self._constants.append(
            TensorProto(name=name, data_type=TensorProto.INT4, dims=values.shape, raw_data=packed.tobytes())
        )
        return name
