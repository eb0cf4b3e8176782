"""An output head with fewer rows: only the tokens that the domain writes can be chosen, the input table stays whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LOGITS, drop_unused_initializers, head_node, insert_before
from export.quantisation.matrices import initializer

SLOTS = "embedding.slots"
_PACKED_INPUTS = slice(1, 4)
"""Weights, scales and zero points of MatMulNBits: a row of each belongs to a token."""


def prune_head(model: ModelProto, ids: npt.NDArray[np.int32]) -> None:
    """Score only some tokens.

    The rows that are kept are a tensor of the head's own, even where the embedding has them as well. Taken out of the
    shared table by a Gather, they would cost every start of a session the whole table: ONNX Runtime reads all of it to
    fold the Gather. Rows that nothing else reads are removed. A shared packed table begins with the kept rows from then
    on, so that they are stored once, and that what events look up in a mapped file lies close together.

    Args:
        model: fp32 or INT4 graph with an attached head, changed in place.
        ids: token ids to keep, int32 [rows], in the order that their rows shall have.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    head = head_node(model)
    columns = next(output for output in model.graph.output if output.name == LOGITS).type.tensor_type.shape.dim[2]
    vocab = columns.dim_value
    if head.op_type == "MatMulNBits":
        if (lookup := _shared_lookup(model, head)) is not None:
            _put_first(model, head, lookup, ids, vocab)
            ids = np.arange(len(ids), dtype=np.int32)
        for position in range(len(head.input))[_PACKED_INPUTS]:
            if head.input[position]:
                head.input[position] = _kept(model, head.input[position], ids, vocab, axis=0)
        _attribute(head, "N").i = len(ids)
    elif head.op_type == "MatMul":
        transpose = next((node for node in model.graph.node if head.input[1] in node.output), None)
        if transpose is None:
            head.input[1] = _kept(model, head.input[1], ids, vocab, axis=1)  # [hidden, vocab]
        else:
            transpose.input[0] = _kept(model, transpose.input[0], ids, vocab, axis=0)  # [vocab, hidden]
    else:
        raise PermanentError("export.graph_unexpected", f"logits come from {head.op_type}")
    columns.dim_value = len(ids)
    drop_unused_initializers(model)


def look_up_rows(model: ModelProto, lookup: NodeProto, tokens: npt.NDArray[np.int64]) -> None:
    """Let a lookup find tokens where they lie now.

    Args:
        model: changed in place.
        lookup: reads a table by token id.
        tokens: the token id of each row that the table has now, int64 [vocab].
    """
    slots = np.empty(len(tokens), np.int32)
    slots[tokens] = np.arange(len(tokens))
    model.graph.initializer.append(numpy_helper.from_array(slots, SLOTS))
    find = helper.make_node("Gather", [SLOTS, lookup.input[1]], ["embedding.slot"], name="embedding.slot", axis=0)
    insert_before(model, lookup, find)
    lookup.input[1] = "embedding.slot"


def _shared_lookup(model: ModelProto, head: NodeProto) -> NodeProto | None:
    """The embedding's lookup, where it reads the head's packed table."""
    lookups = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    return next((node for node in lookups if node.input[0] == head.input[1]), None)


def _put_first(model: ModelProto, head: NodeProto, lookup: NodeProto, ids: npt.NDArray[np.int32], vocab: int) -> None:
    """Let what head and lookup share begin with the rows of ``ids``."""
    tokens = np.concatenate([ids, np.setdiff1d(np.arange(vocab), ids)]).astype(np.int64)
    look_up_rows(model, lookup, tokens)
    for name in filter(None, list(head.input)[_PACKED_INPUTS]):
        tensor = _tensor_behind(model, name)
        rows = numpy_helper.to_array(tensor)
        # Some quantisers store the rows' zero points end to end.
        reordered = rows.reshape(vocab, -1)[tokens].reshape(rows.shape)
        tensor.CopyFrom(numpy_helper.from_array(reordered, tensor.name))


def _kept(model: ModelProto, name: str, ids: npt.NDArray[np.int32], vocab: int, axis: int) -> str:
    """Name of the tensor that holds the kept rows of tensor ``name``."""
    kept = f"{name}.kept"
    whole = _stored(model, name)
    if axis == 0:
        # Some quantisers store the rows' zero points end to end.
        whole = whole.reshape(vocab, -1, *whole.shape[2:])
    rows = np.ascontiguousarray(np.take(whole, ids, axis=axis))
    model.graph.initializer.append(numpy_helper.from_array(rows, kept))
    return kept


def _stored(model: ModelProto, name: str) -> npt.NDArray[Any]:
    """A stored tensor, widened where it is stored as float16."""
    tensor = _tensor_behind(model, name)
    stored = numpy_helper.to_array(tensor)
    return stored if tensor.name == name else stored.astype(np.float32)


def _tensor_behind(model: ModelProto, name: str) -> TensorProto:
    """What is stored for a tensor, which may be widened from float16."""
    cast = next((node for node in model.graph.node if name in node.output and node.op_type == "Cast"), None)
    return initializer(model, name if cast is None else cast.input[0])


def _attribute(node: NodeProto, name: str) -> AttributeProto:
    for attribute in node.attribute:
        if attribute.name == name:
            found: AttributeProto = attribute
            return found
    raise PermanentError("export.graph_unexpected", f"{node.name} has no {name}")
