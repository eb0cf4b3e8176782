"""The body and the output head as two graphs, so that a pass whose scores nobody needs does not pay for them.

ONNX Runtime runs every node of a graph, also those whose outputs nobody fetches: the head can only be left out by
being another graph. Weights that both need (a tied embedding) are stored once: `export.graphs.graph.save_graphs`.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LAST_HIDDEN, LOGITS, drop_unused_initializers, head_node, int_attribute

HIDDEN = "hidden"
CANDIDATES = "candidate_ids"


def split_head(model: ModelProto) -> tuple[ModelProto, ModelProto]:
    """Cut a graph before its output head.

    Args:
        model: fp32, fp16 or INT4 graph of `export.graphs.graph`; it becomes the decoder.

    Returns:
        The decoder, which gives ``hidden`` float [batch, 1, hidden] in place of ``logits``, and the head, which maps
        ``hidden`` to ``logits`` float [batch, 1, rows]. Initializers that both read are in both.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    graph = model.graph
    logits = next(output for output in graph.output if output.name == LOGITS)
    element_type = logits.type.tensor_type.elem_type
    batch = logits.type.tensor_type.shape.dim[0].dim_param or "batch"
    nodes = _nodes_behind(model, LOGITS, LAST_HIDDEN)
    hidden_size = _hidden_size(model)
    head = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    head.opset_import.extend(model.opset_import)
    head.graph.name = "head"
    head.graph.node.extend(nodes)
    for node in head.graph.node:
        node.input[:] = [HIDDEN if name == LAST_HIDDEN else name for name in node.input]
    hidden = helper.make_tensor_value_info(HIDDEN, element_type, [batch, 1, hidden_size])
    head.graph.input.append(hidden)
    head.graph.output.append(logits)
    head.graph.initializer.extend(graph.initializer)
    drop_unused_initializers(head)
    for node in graph.node:
        node.output[:] = [HIDDEN if name == LAST_HIDDEN else name for name in node.output]
    logits.CopyFrom(hidden)
    _remove_idle(model, nodes)
    drop_unused_initializers(model)
    return model, head


def dynamic_head(model: ModelProto) -> None:
    """Score only the tokens that the caller names: a further input ``candidate_ids`` int64 [candidates].

    Their rows are looked up in the packed head, made floats again and multiplied, so that ``logits`` is float
    [batch, 1, candidates]. Exact, where MatMulNBits rounds the hidden state to int8; slow for many candidates.

    Args:
        model: INT4 graph with an attached head, changed in place.

    Raises:
        PermanentError: ``export.graph_unexpected`` when the head is not MatMulNBits, or has zero points.
    """
    graph = model.graph
    head = head_node(model)
    if head.op_type != "MatMulNBits":
        raise PermanentError("export.graph_unexpected", f"a dynamic head needs packed weights, not {head.op_type}")
    rows, block_size = int_attribute(head, "N"), int_attribute(head, "block_size")
    hidden_size = int_attribute(head, "K")
    blocks = -(-hidden_size // block_size)
    constants = {
        "candidates.scale_shape": [rows, blocks, 1],
        "candidates.row_shape": [-1, hidden_size],
    }
    for name, values in constants.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    hidden, packed, scales, *zero_points = head.input
    if any(zero_points):
        raise PermanentError("export.graph_unexpected", "a dynamic head needs symmetric weights")
    nodes = [
        helper.make_node("Reshape", [scales, "candidates.scale_shape"], ["candidates.scales"]),
        helper.make_node(
            "GatherBlockQuantized",
            [packed, CANDIDATES, "candidates.scales"],
            ["candidates.blocks"],  # [candidates, blocks, block_size]
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=2,
            block_size=block_size,
            bits=4,
        ),
        helper.make_node("Reshape", ["candidates.blocks", "candidates.row_shape"], ["candidates.rows"]),
        helper.make_node("Transpose", ["candidates.rows"], ["candidates.columns"], perm=[1, 0]),
        helper.make_node("MatMul", [hidden, "candidates.columns"], [LOGITS]),
    ]
    for number, node in enumerate(nodes):
        node.name = f"candidates.{number}.{node.op_type}"
    graph.node.remove(head)
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(CANDIDATES, TensorProto.INT64, ["candidates"]))
    logits = next(output for output in graph.output if output.name == LOGITS)
    columns = logits.type.tensor_type.shape.dim[2]
    columns.ClearField("dim_value")
    columns.dim_param = "candidates"
    drop_unused_initializers(model)


def _nodes_behind(model: ModelProto, last: str, first: str) -> list[NodeProto]:
    """Nodes that lead from tensor ``first`` to tensor ``last``, in order, and what else they need."""
    wanted, found = {last}, []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output) and first not in node.output:
            found.append(node)
            wanted.update(node.input)
    if first not in wanted:
        raise PermanentError("export.graph_unexpected", f"{last} does not come from {first}")
    return found[::-1]


def _remove_idle(model: ModelProto, candidates: list[NodeProto]) -> None:
    """Remove those nodes whose results nobody needs now; one that widens a shared table's scales stays."""
    needed = {output.name for output in model.graph.output}
    needed.update(name for node in model.graph.node if node not in candidates for name in node.input)
    for node in reversed(candidates):
        if needed.isdisjoint(node.output):
            model.graph.node.remove(node)
        else:
            needed.update(node.input)


def _hidden_size(model: ModelProto) -> int:
    """Read off the last norm's weight, the only vector that every form of head leaves in the graph."""
    vectors = {
        tensor.name: int(tensor.dims[0])
        for tensor in model.graph.initializer
        if len(tensor.dims) == 1 and tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    }
    producers = {name: node for node in model.graph.node for name in node.output}
    # Between the norm and the head the last position may be picked, by a Gather or a GatherND.
    node = producers.get(LAST_HIDDEN)
    while node is not None:
        sizes = [vectors[name] for name in node.input if name in vectors]
        if sizes:
            return sizes[0]
        node = producers.get(node.input[0])
    raise PermanentError("export.graph_unexpected", "no norm is found before the head")
