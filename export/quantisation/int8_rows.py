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

from collections.abc import Sequence
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
_MIDDLE = 128
_ONE, _ZERO_POINT, _WEIGHT_ZERO, _LAST_AXIS, _STEP, _ZERO_POINTS = (
    f"int8_rows.{name}" for name in ("one", "zero", "weight_zero", "axis", "step", "zeros")
)
_SCALING = "_row_scale"
"""Ending of the nodes that give a product's rows their scale back."""
_ATTENTION = "GroupQueryAttention"
_RESIDUAL_SUMS = frozenset({"SkipSimplifiedLayerNormalization", "SkipLayerNormalization"})


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
        _ONE: np.array(1, np.float32),
        _STEP: np.array(1 / LARGEST_CODE, np.float32),
        _ZERO_POINT: np.array(_MIDDLE, np.uint8),
        _WEIGHT_ZERO: np.array(0, np.int8),
        _LAST_AXIS: np.array([-1], np.int64),
    }
    guarded = {matrix.multiplied for matrix in stored_matrices(model) if _hides_nan(model, matrix.multiplied)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    rounded: dict[str, _Rows] = {}
    for matrix in stored_matrices(model):
        if matrix.is_head:
            continue
        node = next(node for node in model.graph.node if node.name == matrix.node)
        if matrix.multiplied not in rounded:
            is_guarded = matrix.multiplied in guarded
            is_first = not rounded
            rounded[matrix.multiplied] = _round_rows(model, matrix, node, is_guarded=is_guarded, is_first=is_first)
        _multiply(model, node, matrix, rounded[matrix.multiplied])
    for name, rows in rounded.items():
        _hand_on_scale(model, name, rows)
    _join_silu(model)
    drop_unused_initializers(model)


@dataclass(frozen=True)
class _Rows:
    """A quantised activation: names of its codes uint8 [batch, seq, columns] and of its scale float [batch, seq, 1]."""

    codes: str
    scale: str


def _round_rows(model: ModelProto, matrix: Matrix, reader: NodeProto, *, is_guarded: bool, is_first: bool) -> _Rows:
    """Quantise a tensor once for all who read it.

    A row of zeros is divided by zero; whatever its codes, the scale makes the product 0. An infinity makes the scale
    infinite. A NaN does not: ReduceMax overlooks it. A mean does not, nor does Max, and a mean never exceeds the
    largest; that is the guard.

    Args:
        model: changed in place.
        matrix: one that the tensor is multiplied with.
        reader: before which the nodes are put.
        is_guarded: whether a NaN must be seen here.
        is_first: whether nothing was rounded before: then the zero points of all rows are made here, too.
    """
    name = matrix.multiplied
    rows = _Rows(f"{name}.codes", f"{name}.scale")
    sizes, largest = f"{name}.sizes", f"{name}.largest"
    nodes = [
        helper.make_node("Abs", [name], [sizes], name=sizes),
        helper.make_node("ReduceMax", [sizes, _LAST_AXIS], [largest], name=largest, keepdims=1),
    ]
    if is_guarded:
        mean, guarded = f"{name}.mean", f"{name}.guarded"
        nodes.append(helper.make_node("ReduceMean", [name, _LAST_AXIS], [mean], name=mean, keepdims=1))
        nodes.append(helper.make_node("Max", [largest, mean], [guarded], name=guarded))
        largest = guarded
    nodes.append(helper.make_node("Mul", [largest, _STEP], [rows.scale], name=rows.scale))
    if is_first:  # uint8 [batch, seq, 1]: QuantizeLinear wants a zero point wherever it has a scale
        shape, middle = f"{_ZERO_POINTS}.shape", numpy_helper.from_array(np.array([_MIDDLE], np.uint8))
        nodes.append(helper.make_node("Shape", [rows.scale], [shape], name=shape))
        nodes.append(helper.make_node("ConstantOfShape", [shape], [_ZERO_POINTS], name=_ZERO_POINTS, value=middle))
    inputs = [name, rows.scale, _ZERO_POINTS]
    nodes.append(
        helper.make_node("QuantizeLinear", inputs, [rows.codes], name=rows.codes, axis=-1, block_size=matrix.columns)
    )
    insert_before(model, reader, *nodes)
    return rows


def _hand_on_scale(model: ModelProto, name: str, rows: _Rows) -> None:
    """Multiply gate and up before up's rows get their scale back: what is rounded next is divided by it again.

    The scale, one number a row, goes to where the next product gets its own.
    """
    made = next((node for node in model.graph.node if name in node.output), None)
    if made is None or made.op_type != "Mul" or any(not _rounds(node) for node in _readers(model, name)):
        return
    for place, factor in enumerate(made.input):
        scaled = next((node for node in model.graph.node if factor in node.output and _is_scaling(node)), None)
        if scaled is None or len(_readers(model, factor)) > 1:
            continue
        product, scale = scaled.input
        made.input[place] = product
        model.graph.node.remove(scaled)
        whole = f"{rows.scale}.handed_on"
        owed = [node for node in _readers(model, rows.scale) if _is_scaling(node)]
        insert_before(model, owed[0], helper.make_node("Mul", [rows.scale, scale], [whole], name=whole))
        for node in owed:
            node.input[1] = whole
        return


def _join_silu(model: ModelProto) -> None:
    """Write ``x * sigmoid(x)`` as the one node that ONNX Runtime would make of it at every start."""
    for sigmoid in [node for node in model.graph.node if node.op_type == "Sigmoid"]:
        (gate,), (share,) = sigmoid.input, sigmoid.output
        readers = _readers(model, share)
        if len(readers) == 1 and readers[0].op_type == "Mul" and set(readers[0].input) == {gate, share}:
            product = readers[0]
            joined = helper.make_node(
                "QuickGelu", [gate], list(product.output), name=product.name, domain="com.microsoft", alpha=1.0
            )
            product.CopyFrom(joined)
            model.graph.node.remove(sigmoid)


def _readers(model: ModelProto, name: str) -> list[NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def _rounds(node: NodeProto) -> bool:
    return node.op_type in {"Abs", "ReduceMean", "QuantizeLinear"}


def _is_scaling(node: NodeProto) -> bool:
    return node.op_type == "Mul" and node.name.endswith(_SCALING)


def _hides_nan(model: ModelProto, name: str) -> bool:
    """Whether a NaN of this tensor would be lost by rounding, and with it what the logits should have told.

    Between a norm and the sum with the residual stream it would not: what the norm made a NaN of is in the stream,
    which carries it to the logits by itself, and there finite weights (others are refused when a checkpoint is opened)
    make no NaN of finite numbers. Keys and values, however, are read by other positions, and what attention gives is
    not in the stream yet.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    between = [node for node in graph.node if not _is_residual_sum(node, stored)]
    made, read = ({one.name for one in values} for values in (graph.input, graph.output))
    if name in made:
        return True
    before = _reached(name, [(node.output, node.input, node.op_type) for node in between])
    behind = _reached(name, [(node.input, node.output, node.op_type) for node in between])
    return before is None or behind is None or not behind.isdisjoint(read)


def _reached(name: str, steps: list[tuple[Sequence[str], Sequence[str], str]]) -> set[str] | None:
    """Tensors that are reached from one, itself included; None where attention is on the way.

    Args:
        name: where to begin.
        steps: of each node the names to come from, those to go to, and its kind.
    """
    found, pending = {name}, [name]
    while pending:
        tensor = pending.pop()
        for sources, targets, kind in steps:
            if tensor not in sources:
                continue
            if kind == _ATTENTION:
                return None
            pending += [target for target in targets if target not in found]
            found.update(targets)
    return found


def _is_residual_sum(node: NodeProto, stored: set[str]) -> bool:
    return node.op_type in _RESIDUAL_SUMS or (node.op_type == "Add" and stored.isdisjoint(node.input))


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
                [rows.codes, codes, _ONE, scales, _ZERO_POINT, _WEIGHT_ZERO],
                [product],
                name=f"{node.name}{suffix}_R8",
                domain="com.microsoft",
            ),
            helper.make_node("Mul", [product, rows.scale], [output], name=f"{node.name}{suffix}{_SCALING}"),
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
