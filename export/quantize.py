"""fp32 graph to INT4: MatMulNBits for every projection, and one packed matrix for a tied embedding and head."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    WeightOnlyQuantConfig,
)

from edge_agent.errors import PermanentError, RefusedError
from export.graph import EMBEDDING, HEAD_WEIGHT, head_node, insert_before

Method = Literal["rtn", "k_quant", "hqq"]
METHODS: tuple[Method, ...] = ("rtn", "k_quant", "hqq")
BLOCK_SIZES = (32, 64, 128)
ACCURACY_LEVEL = 4
"""Activations are quantised to int8 inside MatMulNBits: what makes INT4 fast on CPUs with dot-product instructions."""


@dataclass(frozen=True)
class QuantSettings:
    """How weights are quantised.

    Args:
        method: ``rtn`` (round to nearest, symmetric), ``k_quant`` (error-minimising scale and zero point) or ``hqq``
            (half-quadratic; its zero points are floats, which ONNX Runtime computes on a slower path).
        block_size: weights that share a scale.
    """

    method: Method = "k_quant"
    block_size: int = 32

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise RefusedError("export.block_size", f"block size {self.block_size} is not one of {BLOCK_SIZES}")

    @property
    def label(self) -> str:
        """The precision as manifests and reports name it."""
        return f"int4-{self.method}-{self.block_size}"


def quantize_int4(model: ModelProto, settings: QuantSettings) -> ModelProto:
    """Quantise a fused fp32 graph; ``model`` is consumed.

    Args:
        model: as built by `export.graph.build_fp32`.
        settings: method and block size.

    Returns:
        The INT4 graph with the same inputs and outputs. Norms and rotary tables stay fp32.

    Raises:
        RefusedError: ``export.block_size`` when no allowed block divides the hidden size.
        PermanentError: ``export.quantize_failed``.
    """
    tied = _materialise_head(model)
    head = head_node(model).name
    hidden = _initializer(model, EMBEDDING).dims[1]
    table_block = _dividing_block(hidden, settings.block_size)
    if settings.method == "k_quant":
        _refuse_odd_blocks(model, settings.block_size)
    # The table is looked up by GatherBlockQuantized, which reads neither float zero points nor a ragged last block.
    apart = settings.method == "hqq" or table_block != settings.block_size
    model = _quantize_nodes(model, settings, exclude=[head] if apart else [])
    if apart:
        head_method: Method = "rtn" if settings.method == "hqq" else settings.method
        model = _quantize_nodes(model, QuantSettings(head_method, table_block), exclude=[])
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            _set_accuracy_level(node)
    if tied:
        _share_with_head(model)
    else:
        _quantize_embedding(model, table_block)
    _drop_unused_initializers(model)
    return model


def _refuse_odd_blocks(model: ModelProto, block_size: int) -> None:
    # onnxruntime 1.32 packs k_quant's zero points in pairs and fails on a row that holds an odd number of them.
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_t") and len(tensor.dims) == 2 and -(-tensor.dims[0] // block_size) % 2:
            raise RefusedError(
                "export.block_size",
                f"k_quant needs an even number of blocks a row, but {tensor.dims[0]} weights make "
                f"{-(-tensor.dims[0] // block_size)} blocks of {block_size}: choose another size or method",
            )


def _materialise_head(model: ModelProto) -> bool:
    """Fold Transpose(embedding) into a weight of the head; True when the head was tied to the embedding."""
    head = head_node(model)
    transpose = next((node for node in model.graph.node if head.input[1] in node.output), None)
    if transpose is None:
        return False
    if transpose.op_type != "Transpose" or transpose.input[0] != EMBEDDING:
        raise PermanentError("export.graph_unexpected", f"the head's weight comes from {transpose.op_type}")
    table = numpy_helper.to_array(_initializer(model, EMBEDDING))  # [vocab, hidden]
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(table.T), HEAD_WEIGHT))
    head.input[1] = HEAD_WEIGHT
    model.graph.node.remove(transpose)
    return True


def _quantize_nodes(model: ModelProto, settings: QuantSettings, exclude: list[str]) -> ModelProto:
    config: WeightOnlyQuantConfig
    match settings.method:
        case "rtn":
            config = DefaultWeightOnlyQuantConfig(
                block_size=settings.block_size, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
            )
        case "k_quant":
            config = KQuantWeightOnlyQuantConfig()
        case "hqq":
            config = HQQWeightOnlyQuantConfig(block_size=settings.block_size)
    for name in ("onnxruntime.quantization.matmul_nbits_quantizer", "neural_compressor"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        # k_quant prints a progress bar on stdout, and divides by zero in blocks of equal weights before it masks them.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            quantizer = MatMulNBitsQuantizer(
                model,
                bits=4,
                block_size=settings.block_size,
                is_symmetric=settings.method == "rtn",
                accuracy_level=ACCURACY_LEVEL,
                nodes_to_exclude=exclude,
                algo_config=config,
            )
            quantizer.process()
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise PermanentError("export.quantize_failed", f"{settings.label}: {error}") from error
    result: ModelProto = quantizer.model.model
    return result


def _share_with_head(model: ModelProto) -> None:
    """Look the embedding up in the head's packed weights: one copy in the file and in memory."""
    head = head_node(model)
    if head.op_type != "MatMulNBits":
        raise PermanentError("export.quantize_failed", "the head was not quantised")
    block_size = _int_attribute(head, "block_size")
    packed, scales, *zeros = [_initializer(model, name) for name in head.input[1:4] if name]
    rows, blocks, _ = packed.dims  # [vocab, blocks, block_size / 2] bytes
    scales_3d = numpy_helper.to_array(scales).reshape(rows, blocks, 1)
    zero_points = None
    if zeros:
        # MatMulNBits packs two zero points of a row in a byte; GatherBlockQuantized packs along its own last axis.
        pairs = numpy_helper.to_array(zeros[0]).reshape(rows, -1)  # [vocab, ceil(blocks / 2)]
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(rows, -1)[:, :blocks]
        zero_points = np.ascontiguousarray(nibbles).reshape(rows, blocks, 1)
    _replace_lookup(model, packed.name, scales_3d, zero_points, block_size)


def _quantize_embedding(model: ModelProto, block_size: int) -> None:
    table = numpy_helper.to_array(_initializer(model, EMBEDDING))  # [vocab, hidden]
    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(table.T))
    name = f"{EMBEDDING}_Q4"
    model.graph.initializer.append(numpy_helper.from_array(packed, name))
    _replace_lookup(model, name, scales.reshape(*packed.shape[:2], 1), None, block_size)


def _replace_lookup(
    model: ModelProto,
    packed: str,
    scales: npt.NDArray[np.float32],
    zero_points: npt.NDArray[np.uint8] | None,
    block_size: int,
) -> None:
    """Replace Gather(embedding) by GatherBlockQuantized over ``packed`` [vocab, blocks, block_size / 2]."""
    graph = model.graph
    lookup = next(n for n in graph.node if n.op_type == "Gather" and n.input[0] == EMBEDDING)
    inputs = [packed, lookup.input[1], "embedding.scales"]
    graph.initializer.append(numpy_helper.from_array(scales, "embedding.scales"))
    if zero_points is not None:
        inputs.append("embedding.zero_points")
        graph.initializer.append(numpy_helper.from_array(zero_points, "embedding.zero_points"))
    hidden = scales.shape[1] * block_size
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, hidden], np.int64), "embedding.shape"))
    gather = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        ["embedding.blocks"],  # [batch, seq, blocks, block_size]
        name="embedding",
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=2,
        block_size=block_size,
        bits=4,
    )
    reshape = helper.make_node(
        "Reshape", ["embedding.blocks", "embedding.shape"], [lookup.output[0]], name="embedding.rows"
    )  # [batch, seq, hidden]
    insert_before(model, lookup, gather, reshape)
    graph.node.remove(lookup)


def _drop_unused_initializers(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    for tensor in list(model.graph.initializer):
        if tensor.name not in used:
            model.graph.initializer.remove(tensor)


def _dividing_block(hidden: int, wanted: int) -> int:
    for block in sorted(BLOCK_SIZES, reverse=True):
        if block <= wanted and hidden % block == 0:
            return block
    raise RefusedError("export.block_size", f"hidden size {hidden} is not a multiple of {BLOCK_SIZES[0]}")


def _set_accuracy_level(node: NodeProto) -> None:
    if not any(attribute.name == "accuracy_level" for attribute in node.attribute):
        node.attribute.append(helper.make_attribute("accuracy_level", ACCURACY_LEVEL))


def _int_attribute(node: NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def _initializer(model: ModelProto, name: str) -> TensorProto:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return cast("TensorProto", tensor)
    raise PermanentError("export.graph_unexpected", f"the graph holds no weight {name}")
