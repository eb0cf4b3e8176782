"""A tied table whose rare rows are stored in two bits: what else remains to be saved when the head is pruned.

A pruned head does not make the file smaller, because the embedding still needs every row: any text may come in. But
tokens that the domain never writes come in seldom, too. Their rows keep two bits a weight; the domain's rows keep
their bits and are the head's own, so that nothing is stored twice and nothing is gathered at load.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LOGITS, drop_unused_initializers, head_node, int_attribute
from export.graphs.pruned_head import look_up_rows
from export.quantisation.block_weights import BlockWeights, middle, round_to_grid, unpack
from export.quantisation.grids import least_squares
from export.quantisation.matrices import initializer

RARE_BITS = 2
RARE_BLOCK = 64


def coarsen_table(model: ModelProto, ids: npt.NDArray[np.int32]) -> None:
    """Prune a tied head to ``ids`` and store every other row of its table in two bits.

    Args:
        model: INT4 graph with an attached head, scales still float32; changed in place. Takes the place of
            `export.graphs.pruned_head.prune_head`.
        ids: token ids that the head keeps, int32 [rows], in the order that their rows shall have.

    Raises:
        PermanentError: ``export.graph_unexpected`` when the head is not packed or shares no table with the embedding.
    """
    head = head_node(model)
    lookup = next((n for n in model.graph.node if n.op_type == "GatherBlockQuantized"), None)
    if head.op_type != "MatMulNBits" or lookup is None or lookup.input[0] != head.input[1]:
        raise PermanentError("export.graph_unexpected", "the head shares no packed table with the embedding")
    vocab = int_attribute(head, "N")
    others = np.setdiff1d(np.arange(vocab), ids)
    rare = _rare_rows(_rows(model, head, others))
    _keep_rows(model, head, lookup, ids)
    look_up_rows(model, lookup, np.concatenate([ids, others]))
    _look_up_both(model, lookup, len(ids), rare)
    columns = next(output for output in model.graph.output if output.name == LOGITS).type.tensor_type.shape.dim[2]
    columns.dim_value = len(ids)
    drop_unused_initializers(model)


def _rows(model: ModelProto, head: NodeProto, ids: npt.NDArray[np.int64]) -> BlockWeights:
    bits, block_size = int_attribute(head, "bits"), int_attribute(head, "block_size")
    packed, scales, *zeros = [numpy_helper.to_array(initializer(model, name))[ids] for name in head.input[1:4] if name]
    zero_points = unpack(zeros[0], bits)[:, : scales.shape[1]] if zeros else None
    return BlockWeights(packed, scales, zero_points, bits, block_size, int_attribute(head, "K"))


def _rare_rows(rows: BlockWeights) -> BlockWeights:
    """The rows in two bits, and one more that is zero: what the last index stands for."""
    weights = np.pad(rows.dequantised(), [(0, 1), (0, 0)])
    block_size = math.gcd(RARE_BLOCK, rows.columns)
    rare = round_to_grid(torch.from_numpy(weights), least_squares, RARE_BITS, block_size, symmetric=True)
    # Four codes a byte, each the middle one: whatever the scale, these are zeros.
    rare.packed[-1] = sum(middle(RARE_BITS) << shift for shift in (0, 2, 4, 6))
    rare.scales[-1] = 1
    return rare


def _keep_rows(model: ModelProto, head: NodeProto, lookup: NodeProto, ids: npt.NDArray[np.int32]) -> None:
    """Leave only the rows of ``ids`` in the tensors that head and lookup share."""
    vocab = int_attribute(head, "N")
    for name in filter(None, head.input[1:4]):
        tensor = initializer(model, name)
        rows = np.ascontiguousarray(numpy_helper.to_array(tensor)[ids])
        tensor.CopyFrom(numpy_helper.from_array(rows, name))
    next(attribute for attribute in head.attribute if attribute.name == "N").i = len(ids)
    # Scales and zero points reach the lookup through Reshapes that spell the number of rows.
    producers = {node.output[0]: node for node in model.graph.node}
    waiting = list(lookup.input[2:])
    while waiting:
        node = producers.get(waiting.pop())
        if node is None:
            continue
        waiting.extend(node.input)
        if node.op_type == "Reshape":
            shape = initializer(model, node.input[1])
            sizes = numpy_helper.to_array(shape)
            if sizes[0] == vocab:
                shape.CopyFrom(numpy_helper.from_array(np.array([len(ids), *sizes[1:]], np.int64), shape.name))


def _look_up_both(model: ModelProto, lookup: NodeProto, common_rows: int, rare: BlockWeights) -> None:
    """Add what either table gives: an index that is too large gives zeros, the index -1 gives the row of zeros."""
    reshape = next(node for node in model.graph.node if lookup.output[0] in node.input)
    result = reshape.output[0]
    reshape.output[0] = "embedding.common"
    blocks = rare.scales.shape[1]
    tensors: dict[str, np.ndarray] = {
        "embedding.common_rows": np.array(common_rows, np.int32),
        "embedding.no_row": np.array(-1, np.int32),
        f"embedding.rare_Q{RARE_BITS}": rare.packed,
        "embedding.rare_scales": rare.scales.reshape(*rare.scales.shape, 1),
        "embedding.rare_shape": np.array([0, 0, blocks * rare.block_size], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    position = list(model.graph.node).index(reshape) + 1
    nodes = [
        helper.make_node("Sub", ["embedding.slot", "embedding.common_rows"], ["embedding.behind"]),
        helper.make_node("Max", ["embedding.behind", "embedding.no_row"], ["embedding.rare_slot"]),
        helper.make_node(
            "GatherBlockQuantized",
            [f"embedding.rare_Q{RARE_BITS}", "embedding.rare_slot", "embedding.rare_scales"],
            ["embedding.rare_blocks"],  # [batch, seq, blocks, block_size]
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=2,
            block_size=rare.block_size,
            bits=RARE_BITS,
        ),
        helper.make_node("Reshape", ["embedding.rare_blocks", "embedding.rare_shape"], ["embedding.rare"]),
        helper.make_node("Add", ["embedding.common", "embedding.rare"], [result]),
    ]
    for offset, node in enumerate(nodes):
        node.name = node.output[0] if node.output[0] != result else "embedding.either"
        model.graph.node.insert(position + offset, node)
