"""Projections in eight bits, their inputs rounded by rows: more bytes than INT4, and passes of many tokens much faster.

A token's activations are rounded by that token's own largest magnitude, never by its neighbours': the sum of integers
is exact, so a row's product is the same bits alone and in any pass or batch. ONNX Runtime's DynamicQuantizeMatMul has
one scale for all rows, and an event's answer would depend on what else is in its pass.

Weights have one scale an output. Activations are uint8 around 128: ONNX Runtime multiplies uint8 by int8 several
times faster than int8 by int8 on x86. There, processors with AVX2 but without VNNI add two neighbouring products in 16
bits, and saturate: so a scale is chosen that leaves no two neighbours a sum above 16 bits. It costs 2.5 dB of 43, a
seventh bit would cost 6, and the sum is exact on every processor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper

from export.graphs.graph import drop_unused_initializers, insert_before
from export.quantisation.block_weights import storable
from export.quantisation.matrices import Matrix, initializer, read_matrix, stored_matrices

LABEL = "int8-row"
"""The precision as manifests and reports name it."""

LARGEST_CODE = 127
LARGEST_PAIR = 128
"""255, the largest activation, times so much is below 2**15; times one more it is not."""
_ZERO = 128
_UNIT, _ZERO_POINT, _WEIGHT_ZERO, _LAST_AXIS = (f"int8_rows.{name}" for name in ("unit", "zero", "weight_zero", "axis"))


@dataclass(frozen=True)
class ColumnWeights:
    """A matrix as MatMulIntegerToFloat reads it; a weight is ``code * scale``.

    Args:
        codes: int8 [inputs, outputs].
        scales: float32 [outputs].
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    def dequantised(self) -> npt.NDArray[np.float32]:
        """The matrix that the device computes with, float32 [outputs, inputs]."""
        weights: npt.NDArray[np.float32] = self.codes.T * self.scales[:, None]
        return weights


def round_columns(weight: torch.Tensor) -> ColumnWeights:
    """Quantise a matrix with one scale an output, so that no two neighbours of a column sum to more than 128.

    No smaller scale is searched for: clipping what is largest gains 0.1 dB at eight bits.

    Args:
        weight: float32 [outputs, inputs].
    """
    outputs, inputs = weight.shape
    pairs = torch.nn.functional.pad(weight, (0, inputs % 2)).view(outputs, -1, 2)
    same_sign = torch.maximum(pairs.clamp(min=0).sum(-1), pairs.clamp(max=0).sum(-1).abs())  # [outputs, pairs]
    # A sum of 127 steps may round to 128: each of the two by half a step. It is never less than the larger of them.
    largest = same_sign.amax(1)
    scale = storable(torch.where(largest > 0, largest / LARGEST_CODE, 1.0))
    codes = torch.round(weight / scale[:, None]).clamp_(-LARGEST_CODE, LARGEST_CODE)
    return ColumnWeights(np.ascontiguousarray(codes.to(torch.int8).numpy().T), scale.numpy())


def quantise_rows(model: ModelProto) -> None:
    """Replace every projection by one of integers; embedding and head stay as they are.

    Projections that were laid side by side are taken apart again: the Split of their result costs more than the
    second call, and they share the quantised input anyway.

    Args:
        model: fused fp32 graph, changed in place.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    constants: dict[str, np.ndarray] = {
        _UNIT: np.array(1 / LARGEST_CODE, np.float32),
        _ZERO_POINT: np.array(_ZERO, np.uint8),
        _WEIGHT_ZERO: np.array(0, np.int8),
        _LAST_AXIS: np.array([-1], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    rounded: dict[str, _Rows] = {}
    for matrix in stored_matrices(model):
        if matrix.is_head:
            continue
        node = next(node for node in model.graph.node if node.name == matrix.node)
        if matrix.multiplied not in rounded:
            rounded[matrix.multiplied] = _round_rows(model, matrix.multiplied, node)
        _multiply(model, node, matrix, rounded[matrix.multiplied])
    drop_unused_initializers(model)


@dataclass(frozen=True)
class _Rows:
    """A quantised activation: names of its codes uint8 [batch, seq, columns] and of its scale float [batch, seq, 1]."""

    codes: str
    scale: str


def _round_rows(model: ModelProto, name: str, reader: NodeProto) -> _Rows:
    """Quantise tensor ``name`` once for all who read it.

    A row of zeros is divided by zero; whatever its codes, the scale makes the product 0. A row with a NaN must not
    become a plausible one: ReduceMax overlooks NaN and a mean does not, nor does Max; a mean never exceeds the largest.
    """
    rows = _Rows(f"{name}.codes", f"{name}.largest")
    magnitude, peak, mean, within = (f"{name}.{part}" for part in ("magnitude", "peak", "mean", "within"))
    insert_before(
        model,
        reader,
        helper.make_node("Abs", [name], [magnitude], name=magnitude),
        helper.make_node("ReduceMax", [magnitude, _LAST_AXIS], [peak], name=peak, keepdims=1),
        helper.make_node("ReduceMean", [magnitude, _LAST_AXIS], [mean], name=mean, keepdims=1),
        helper.make_node("Max", [peak, mean], [rows.scale], name=rows.scale),
        helper.make_node("Div", [name, rows.scale], [within], name=within),
        helper.make_node("QuantizeLinear", [within, _UNIT, _ZERO_POINT], [rows.codes], name=rows.codes),
    )
    return rows


def _multiply(model: ModelProto, node: NodeProto, matrix: Matrix, rows: _Rows) -> None:
    weight = read_matrix(model, matrix)  # [outputs, inputs]
    split = _only_split(model, node)
    outputs, sizes = list(node.output), [matrix.rows]
    if split is not None:
        outputs = list(split.output)
        sizes = numpy_helper.to_array(initializer(model, split.input[1])).tolist()
        model.graph.node.remove(split)
    for number, (output, part) in enumerate(zip(outputs, weight.split(sizes), strict=True)):
        suffix = f".{number}" if len(outputs) > 1 else ""
        stored = round_columns(part)
        codes, scales = f"{matrix.weight}{suffix}_R8", f"{matrix.weight}{suffix}_scales"
        model.graph.initializer.extend(
            [numpy_helper.from_array(stored.codes, codes), numpy_helper.from_array(stored.scales, scales)]
        )
        product = f"{output}.product"
        insert_before(
            model,
            node,
            helper.make_node(
                "MatMulIntegerToFloat",
                [rows.codes, codes, _UNIT, scales, _ZERO_POINT, _WEIGHT_ZERO],
                [product],
                name=f"{node.name}{suffix}_R8",
                domain="com.microsoft",
            ),
            helper.make_node("Mul", [product, rows.scale], [output], name=f"{node.name}{suffix}_scale"),
        )
    model.graph.node.remove(node)


def _only_split(model: ModelProto, node: NodeProto) -> NodeProto | None:
    """The Split that alone reads a product, along its last axis and into sizes that are stored."""
    readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
    if len(readers) != 1 or readers[0].op_type != "Split" or len(readers[0].input) != len(("packed", "sizes")):
        return None
    if all(tensor.name != readers[0].input[1] for tensor in model.graph.initializer):
        return None
    axis = next((attribute.i for attribute in readers[0].attribute if attribute.name == "axis"), 0)
    return readers[0] if axis == -1 else None
