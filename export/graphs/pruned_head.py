"""An output head with fewer rows: only the tokens that the domain writes can be chosen, the input table stays whole."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LOGITS, drop_unused_initializers, head_node, insert_before

_KEPT_IDS = "head.kept_ids"
_PACKED_INPUTS = slice(1, 4)
"""Weights, scales and zero points of MatMulNBits: a row of each belongs to a token."""


def prune_head(model: ModelProto, ids: npt.NDArray[np.int32]) -> None:
    """Score only some tokens.

    Rows that the embedding shares stay in the file once: the head takes its own by a Gather of stored tensors, which
    ONNX Runtime folds when the session is made, before it packs the weights for the CPU. Rows that nothing else reads
    are removed.

    Args:
        model: fp32 or INT4 graph with an attached head, changed in place.
        ids: token ids to keep, int32 [rows], ascending.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    head = head_node(model)
    columns = next(output for output in model.graph.output if output.name == LOGITS).type.tensor_type.shape.dim[2]
    vocab = columns.dim_value
    if head.op_type == "MatMulNBits":
        for position in range(len(head.input))[_PACKED_INPUTS]:
            if head.input[position]:
                head.input[position] = _kept(model, head, head.input[position], ids, vocab, axis=0)
        _attribute(head, "N").i = len(ids)
    elif head.op_type == "MatMul":
        transpose = next((node for node in model.graph.node if head.input[1] in node.output), None)
        if transpose is None:
            head.input[1] = _kept(model, head, head.input[1], ids, vocab, axis=1)  # [hidden, vocab]
        else:
            transpose.input[0] = _kept(model, transpose, transpose.input[0], ids, vocab, axis=0)  # [vocab, hidden]
    else:
        raise PermanentError("export.graph_unexpected", f"logits come from {head.op_type}")
    columns.dim_value = len(ids)
    drop_unused_initializers(model)


def _kept(model: ModelProto, reader: NodeProto, name: str, ids: npt.NDArray[np.int32], vocab: int, axis: int) -> str:
    """Name of the tensor that holds the kept rows of tensor ``name``."""
    graph = model.graph
    kept = f"{name}.kept"
    stored = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    readers = sum(name in node.input for node in graph.node)
    if stored is not None and axis == 0 and stored.dims[0] != vocab:
        # Some quantisers store the rows' zero points end to end.
        stored.dims[:] = [vocab, math.prod(stored.dims) // vocab]
    if stored is not None and readers == 1:
        rows = np.take(numpy_helper.to_array(stored), ids, axis=axis)
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows), kept))
        return kept
    if all(tensor.name != _KEPT_IDS for tensor in graph.initializer):
        graph.initializer.append(helper.make_tensor(_KEPT_IDS, TensorProto.INT32, [len(ids)], ids.tobytes(), raw=True))
    gather = helper.make_node("Gather", [name, _KEPT_IDS], [kept], name=kept, axis=axis)
    insert_before(model, reader, gather)
    return kept


def _attribute(node: NodeProto, name: str) -> AttributeProto:
    for attribute in node.attribute:
        if attribute.name == name:
            found: AttributeProto = attribute
            return found
    raise PermanentError("export.graph_unexpected", f"{node.name} has no {name}")
