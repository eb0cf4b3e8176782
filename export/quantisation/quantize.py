"""fp32 graph to INT4: MatMulNBits for every projection, and one packed matrix for a tied embedding and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edge_agent.errors import PermanentError, RefusedError
from export.graphs.graph import EMBEDDING, insert_before
from export.quantisation.block_weights import BlockWeights, GridRule, round_to_grid
from export.quantisation.gptq import gptq_round, hessians
from export.quantisation.grids import extremes, half_quadratic, least_squares
from export.quantisation.matrices import Matrix, initializer, read_matrix, read_tensor, stored_matrices

Method = Literal["rtn", "k_quant", "hqq", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "k_quant", "hqq")
CALIBRATED_METHODS: tuple[Method, ...] = ("gptq",)
"""These need the task's own texts."""
BLOCK_SIZES = (32, 64, 128)
ACCURACY_LEVEL = 4
"""Activations are quantised to int8 inside MatMulNBits: what makes INT4 fast on CPUs with dot-product instructions."""
INT4_BITS, INT8_BITS = 4, 8

_RULES: dict[Method, GridRule] = {
    "rtn": extremes,
    "k_quant": least_squares,
    "hqq": half_quadratic,
    "gptq": least_squares,
}
_SYMMETRIC_BY_DEFAULT: dict[Method, bool] = {"rtn": True, "k_quant": True, "hqq": False, "gptq": True}


@dataclass(frozen=True)
class QuantSettings:
    """How weights are quantised.

    Args:
        method: ``rtn`` (round to nearest), ``k_quant`` (grid of least squares), ``hqq`` (half-quadratic; its zero
            points are floats, which ONNX Runtime computes on a slower path) or ``gptq`` (rounding that makes good its
            own errors on the task's texts).
        block_size: weights that share a scale, at most: a matrix takes the largest size that divides its rows.
        symmetric: whether the middle code is 0 and no zero points are stored; None: as is usual for the method.
        int8_nodes: names of MatMuls that keep eight bits (see `export.quantisation.sensitivity`).

    Raises:
        RefusedError: ``export.block_size``, or ``export.method_unsuitable`` for symmetric hqq.
    """

    method: Method = "k_quant"
    block_size: int = 32
    symmetric: bool | None = None
    int8_nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise RefusedError("export.block_size", f"block size {self.block_size} is not one of {BLOCK_SIZES}")
        if self.method == "hqq" and self.symmetric:
            raise RefusedError("export.method_unsuitable", "hqq optimises the zero points: it has no symmetric form")

    @property
    def is_symmetric(self) -> bool:
        """Whether zero points are left out, the method's default resolved."""
        return _SYMMETRIC_BY_DEFAULT[self.method] if self.symmetric is None else self.symmetric

    @property
    def needs_texts(self) -> bool:
        """Whether the method is calibrated."""
        return self.method in CALIBRATED_METHODS

    @property
    def label(self) -> str:
        """The precision as manifests and reports name it."""
        unusual = self.is_symmetric != _SYMMETRIC_BY_DEFAULT[self.method]
        shape = ("-sym" if self.is_symmetric else "-asym") if unusual else ""
        mixed = f"+int8x{len(self.int8_nodes)}" if self.int8_nodes else ""
        return f"int4-{self.method}-{self.block_size}{shape}{mixed}"


def quantize_int4(
    model: ModelProto, settings: QuantSettings, *, calibration_ids: Sequence[Sequence[int]] = ()
) -> ModelProto:
    """Quantise a fused fp32 graph; ``model`` is consumed.

    Args:
        model: as built by `export.graphs.graph.build_fp32`.
        settings: method, block size and exceptions.
        calibration_ids: token ids of rendered prompts with their answers, for calibrated methods.

    Returns:
        The INT4 graph with the same inputs and outputs. Norms and rotary tables stay fp32.

    Raises:
        RefusedError: ``export.block_size`` when no allowed block divides the hidden size,
            ``export.calibration_missing``, or ``export.node_unknown`` for exceptions that the graph does not hold.
        PermanentError: ``export.quantize_failed`` or ``export.graph_unexpected``.
    """
    matrices = stored_matrices(model)
    unknown = set(settings.int8_nodes) - {matrix.node for matrix in matrices}
    if unknown:
        raise RefusedError("export.node_unknown", f"the graph holds no MatMul {', '.join(sorted(unknown))}")
    hidden = int(initializer(model, EMBEDDING).dims[1])
    table_block = _dividing_block(hidden, settings.block_size)
    quantised = dict(_quantised(model, matrices, settings, table_block, calibration_ids))
    for matrix in matrices:
        _replace_matmul(model, matrix, quantised[matrix.node])
    tied = next((matrix for matrix in matrices if matrix.is_tied), None)
    if tied is None:
        table = read_tensor(initializer(model, EMBEDDING))  # [vocab, hidden]
        _replace_lookup(model, _store(model, EMBEDDING, _rounded(table, settings, INT4_BITS, table_block)))
    else:
        _replace_lookup(model, _stored(tied, quantised[tied.node]))
    return _without_unused(model)


def quantise_matrix(
    weight: torch.Tensor, settings: QuantSettings, bits: int = INT4_BITS, hessian: torch.Tensor | None = None
) -> BlockWeights:
    """Quantise one matrix as `quantize_int4` would.

    Args:
        weight: float32 [rows, columns].
        settings: method and block size.
        bits: 4, or 8 for a matrix that is sensitive.
        hessian: X^T X of its inputs, float32 [columns, columns], for calibrated methods.
    """
    if hessian is None or bits == INT8_BITS:
        return _rounded(weight, settings, bits, settings.block_size)
    rule = _RULES[settings.method]
    return gptq_round(weight, hessian, rule, bits, settings.block_size, symmetric=settings.is_symmetric)


def _quantised(
    model: ModelProto,
    matrices: list[Matrix],
    settings: QuantSettings,
    table_block: int,
    texts: Sequence[Sequence[int]],
) -> Iterator[tuple[str, BlockWeights]]:
    plain = [matrix for matrix in matrices if matrix.is_tied or not settings.needs_texts]
    for matrix in plain:
        # A tied table is looked up, too: it must be near its own weights, not only near its products. And the lookup
        # reads neither float zero points nor a ragged last block.
        bits = _bits(matrix, settings)
        block = table_block if matrix.is_tied else _fitting_block(matrix.columns, settings.block_size)
        yield matrix.node, _rounded(read_matrix(model, matrix), settings, bits, block, is_table=matrix.is_tied)
    if not settings.needs_texts:
        return
    for gathered in hessians(model, texts):
        for matrix in matrices:
            if not matrix.is_tied and matrix.multiplied in gathered:
                weight, hessian = read_matrix(model, matrix), gathered[matrix.multiplied]
                fitting = replace(settings, block_size=_fitting_block(matrix.columns, settings.block_size))
                yield matrix.node, quantise_matrix(weight, fitting, _bits(matrix, settings), hessian)


def _rounded(
    weight: torch.Tensor, settings: QuantSettings, bits: int, block_size: int, *, is_table: bool = True
) -> BlockWeights:
    if bits == INT8_BITS:
        # 256 codes leave nothing to optimise.
        return round_to_grid(weight, extremes, bits, block_size, symmetric=True)
    rule = least_squares if is_table and settings.method == "hqq" else _RULES[settings.method]
    return round_to_grid(weight, rule, bits, block_size, symmetric=settings.is_symmetric)


def _bits(matrix: Matrix, settings: QuantSettings) -> int:
    return INT8_BITS if matrix.node in settings.int8_nodes else INT4_BITS


@dataclass(frozen=True)
class _Stored:
    """Where a quantised matrix lies in the graph: names of its initializers."""

    packed: str
    scales: str
    zero_points: str | None
    weights: BlockWeights


def _stored(matrix: Matrix, weights: BlockWeights) -> _Stored:
    return _names(matrix.weight, weights)


def _names(name: str, weights: BlockWeights) -> _Stored:
    zero_points = None if weights.zero_points is None else f"{name}_zero_points"
    return _Stored(f"{name}_Q{weights.bits}", f"{name}_scales", zero_points, weights)


def _store(model: ModelProto, name: str, weights: BlockWeights) -> _Stored:
    stored = _names(name, weights)
    arrays: dict[str, np.ndarray] = {stored.packed: weights.packed, stored.scales: weights.scales}
    zero_points = weights.packed_zero_points()
    if stored.zero_points is not None and zero_points is not None:
        arrays |= {stored.zero_points: zero_points}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return stored


def _replace_matmul(model: ModelProto, matrix: Matrix, weights: BlockWeights) -> None:
    stored = _store(model, matrix.weight, weights)
    node = next(node for node in model.graph.node if node.name == matrix.node)
    product = helper.make_node(
        "MatMulNBits",
        [matrix.multiplied, stored.packed, stored.scales, *([stored.zero_points] if stored.zero_points else [])],
        list(node.output),
        name=f"{node.name}_Q{weights.bits}",
        domain="com.microsoft",
        K=weights.columns,
        N=weights.rows,
        bits=weights.bits,
        block_size=weights.block_size,
        accuracy_level=ACCURACY_LEVEL,
    )
    node.CopyFrom(product)


def _replace_lookup(model: ModelProto, table: _Stored) -> None:
    """Replace Gather(embedding) by GatherBlockQuantized over the packed table [vocab, blocks, bytes].

    Scales and zero points are reshaped in the graph, not stored again: constant folding does it at load.
    """
    weights = table.weights
    rows, blocks, _ = weights.packed.shape
    lookup = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == EMBEDDING)
    shapes = {
        "embedding.block_shape": [rows, blocks, 1],
        "embedding.shape": [0, 0, blocks * weights.block_size],
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()
    )
    nodes = [_node("Reshape", [table.scales, "embedding.block_shape"], "embedding.scales")]
    inputs = [table.packed, lookup.input[1], "embedding.scales"]
    if table.zero_points is not None:
        nodes += _zero_points_a_block(model, table.zero_points, weights)
        inputs.append("embedding.zero_points")
    gather = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        ["embedding.blocks"],  # [batch, seq, blocks, block_size]
        name="embedding",
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=2,
        block_size=weights.block_size,
        bits=weights.bits,
    )
    reshape = helper.make_node(
        "Reshape", ["embedding.blocks", "embedding.shape"], [lookup.output[0]], name="embedding.rows"
    )  # [batch, seq, hidden]
    insert_before(model, lookup, *nodes, gather, reshape)
    model.graph.node.remove(lookup)


def _zero_points_a_block(model: ModelProto, packed: str, weights: BlockWeights) -> list[NodeProto]:
    """From two zero points in a byte, as MatMulNBits has them, to one: [vocab, blocks / 2] to [vocab, blocks, 1]."""
    if weights.bits != INT4_BITS:
        raise PermanentError("export.quantize_failed", "zero points of the table are expected in four bits")
    rows, blocks = weights.scales.shape
    constants: dict[str, np.ndarray] = {
        "embedding.low_bits": np.array(15, np.uint8),
        "embedding.half_byte": np.array(4, np.uint8),
        "embedding.last_axis": np.array([2], np.int64),
        "embedding.pair_shape": np.array([rows, -1], np.int64),
        "embedding.first_block": np.array([0], np.int64),
        "embedding.end_block": np.array([blocks], np.int64),
        "embedding.block_axis": np.array([1], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return [
        _node("BitwiseAnd", [packed, "embedding.low_bits"], "embedding.even"),
        _node("BitShift", [packed, "embedding.half_byte"], "embedding.odd", direction="RIGHT"),
        _node("Unsqueeze", ["embedding.even", "embedding.last_axis"], "embedding.even_column"),
        _node("Unsqueeze", ["embedding.odd", "embedding.last_axis"], "embedding.odd_column"),
        _node("Concat", ["embedding.even_column", "embedding.odd_column"], "embedding.pairs", axis=2),
        _node("Reshape", ["embedding.pairs", "embedding.pair_shape"], "embedding.nibbles"),
        _node(
            "Slice",
            ["embedding.nibbles", "embedding.first_block", "embedding.end_block", "embedding.block_axis"],
            "embedding.whole_blocks",
        ),
        _node("Reshape", ["embedding.whole_blocks", "embedding.block_shape"], "embedding.zero_points"),
    ]


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], name=f"{output}.{operator}", **attributes)


def _without_unused(model: ModelProto) -> ModelProto:
    """A new model without the fp32 weights, which memory holds for as long as the old one lives."""
    used = {name for node in model.graph.node for name in node.input}
    for node in [n for n in model.graph.node if n.op_type == "Transpose" and n.output[0] not in used]:
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    result = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    result.opset_import.extend(model.opset_import)
    result.graph.name = model.graph.name
    result.graph.node.extend(model.graph.node)
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    return result


def _fitting_block(columns: int, wanted: int) -> int:
    """The largest block that wastes nothing: a ragged last block is padded with weights that nobody has."""
    return max((block for block in BLOCK_SIZES if block <= wanted and columns % block == 0), default=wanted)


def _dividing_block(hidden: int, wanted: int) -> int:
    for block in sorted(BLOCK_SIZES, reverse=True):
        if block <= wanted and hidden % block == 0:
            return block
    raise RefusedError("export.block_size", f"hidden size {hidden} is not a multiple of {BLOCK_SIZES[0]}")
