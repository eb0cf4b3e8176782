"""Scores at the positions that the caller names: the input ``score_at``.

A graph that scores its last position only needs a pass for every choice. With several positions scored in one pass, a
guess at the whole answer is checked at once, and rows of a batch are scored each at its own end.

The positions are picked right behind the last attention: nobody reads what the last layer's projections would make of
the others.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LAST_POSITION, LOGITS, drop_unused_initializers, insert_before

SCORE_AT = "score_at"
_AXIS = "score_at.axis"
_SCORES = "scores"


def score_chosen_positions(model: ModelProto) -> None:
    """Give a graph the input ``score_at`` int64 [scores, 2]: row and position, counted within the pass, of each score.

    ``logits`` becomes float [scores, 1, rows] (``hidden`` float [scores, 1, hidden] where the head is cut off later).

    Args:
        model: graph with last-position logits, its head attached, changed in place; fp32 or quantised.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    graph = model.graph
    pick = next((node for node in graph.node if node.name == LAST_POSITION), None)
    if pick is None:
        raise PermanentError("export.graph_unexpected", "the graph has no last position to replace")
    graph.input.append(helper.make_tensor_value_info(SCORE_AT, TensorProto.INT64, [_SCORES, 2]))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), _AXIS))
    behind = _behind_attention(model, pick.input[0])
    if not behind:
        raise PermanentError("export.graph_unexpected", "the graph has no fused attention before its last position")
    inside = {name for node in behind for name in node.output}
    outside = _of_the_tokens(model) - inside
    # [batch, seq, …] each: the attention's result, the residual stream beside it, and what goes with their rows.
    for name in dict.fromkeys(name for node in behind for name in node.input if name in outside):
        readers = [node for node in behind if name in node.input]
        insert_before(model, readers[0], *_pick(name))
        for node in readers:
            node.input[:] = [_picked(name) if one == name else one for one in node.input]
    behind[-1].output[:] = [pick.output[0] if one == pick.input[0] else one for one in behind[-1].output]
    graph.node.remove(pick)
    _remove_idle(model)
    logits = next(output for output in graph.output if output.name == LOGITS)
    rows = logits.type.tensor_type.shape.dim[0]
    rows.ClearField("dim_value")
    rows.dim_param = _SCORES
    drop_unused_initializers(model)


def _behind_attention(model: ModelProto, end: str) -> list[NodeProto]:
    """What lies between the last attention and ``end``, in order of evaluation; it treats every position by itself."""
    nodes = list(model.graph.node)
    last = max((place for place, node in enumerate(nodes) if node.op_type == "GroupQueryAttention"), default=None)
    if last is None:
        return []
    reached = {nodes[last].output[0]}
    behind = []
    for node in nodes[last + 1 :]:
        if not reached.isdisjoint(node.input):
            reached.update(node.output)
            behind.append(node)
        if end in node.output:
            return behind
    return []


def _of_the_tokens(model: ModelProto) -> set[str]:
    """Tensors that are computed from the tokens; the others are weights, or made of them."""
    found = {model.graph.input[0].name}
    for node in model.graph.node:
        if not found.isdisjoint(node.input):
            found.update(node.output)
    return found


def _pick(name: str) -> tuple[NodeProto, NodeProto]:
    """[batch, seq, columns] by [scores, 2] -> [scores, columns] -> [scores, 1, columns]."""
    rows, result = f"{name}.scored_rows", _picked(name)
    return (
        helper.make_node("GatherND", [name, SCORE_AT], [rows], name=rows),
        helper.make_node("Unsqueeze", [rows, _AXIS], [result], name=result),
    )


def _picked(name: str) -> str:
    return f"{name}.scored"


def _remove_idle(model: ModelProto) -> None:
    """Remove what only the former last position needed: the end of each row of a ragged batch."""
    while True:
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        idle: list[NodeProto] = [node for node in model.graph.node if read.isdisjoint(node.output)]
        if not idle:
            return
        for node in idle:
            model.graph.node.remove(node)
