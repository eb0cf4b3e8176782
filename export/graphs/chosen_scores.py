"""Scores at the positions that the caller names: the input ``score_at``.

A graph that scores its last position only needs a pass for every choice. With several positions scored in one pass, a
guess at the whole answer is checked at once, and rows of a batch are scored each at its own end. Attention, norms and
projections are as they were: only the head is computed for more rows.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LAST_POSITION, LOGITS, drop_unused_initializers, insert_before

SCORE_AT = "score_at"
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
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "score_at.axis"))
    insert_before(
        model,
        pick,
        # [batch, seq, hidden] by [scores, 2] -> [scores, hidden] -> [scores, 1, hidden]
        helper.make_node("GatherND", [pick.input[0], SCORE_AT], ["score_at.hidden"], name="score_at.hidden"),
        helper.make_node("Unsqueeze", ["score_at.hidden", "score_at.axis"], [pick.output[0]], name=LAST_POSITION),
    )
    graph.node.remove(pick)
    _remove_idle(model)
    logits = next(output for output in graph.output if output.name == LOGITS)
    rows = logits.type.tensor_type.shape.dim[0]
    rows.ClearField("dim_value")
    rows.dim_param = _SCORES
    drop_unused_initializers(model)


def _remove_idle(model: ModelProto) -> None:
    """Remove what only the former last position needed: the end of each row of a ragged batch."""
    while True:
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        idle: list[NodeProto] = [node for node in model.graph.node if read.isdisjoint(node.output)]
        if not idle:
            return
        for node in idle:
            model.graph.node.remove(node)
