"""Batches whose rows continue by different numbers of tokens: the input ``query_seqlens``.

GroupQueryAttention of ONNX Runtime 1.32 takes the number of real tokens of each row; the rest of a row is padding on
the right. Without it, a batch with a past and more than one new token is refused by the kernel.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.graphs.graph import LAST_POSITION, drop_unused_initializers, insert_before

QUERY_SEQLENS = "query_seqlens"
_QUERY_SEQLENS_INPUT = 16
"""Position of the optional input among those of GroupQueryAttention."""


def add_ragged(model: ModelProto) -> None:
    """Give a graph the input ``query_seqlens`` int32 [batch]: how many tokens of each row are real.

    ``attention_mask`` then has ``past + query_seqlens`` ones in each row, and the last position is each row's own.

    Args:
        model: graph with last-position logits or hidden states, changed in place; fp32 or quantised.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    graph.input.append(helper.make_tensor_value_info(QUERY_SEQLENS, TensorProto.INT32, [batch]))
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    for node in attention:
        missing = _QUERY_SEQLENS_INPUT - len(node.input)
        node.input.extend([*[""] * missing, QUERY_SEQLENS])
    pick = next((node for node in graph.node if node.name == LAST_POSITION), None)
    if pick is None or not attention:
        raise PermanentError("export.graph_unexpected", "the graph has no fused attention or no last position")
    output = pick.output[0]  # `hidden` where the head is apart
    for name, values in {"ragged.one": [1], "ragged.axes": [1, 2]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    insert_before(
        model,
        pick,
        helper.make_node("Cast", [QUERY_SEQLENS], ["ragged.counts"], name="ragged.counts", to=TensorProto.INT64),
        helper.make_node("Sub", ["ragged.counts", "ragged.one"], ["ragged.last"], name="ragged.last"),
        helper.make_node("Unsqueeze", ["ragged.last", "ragged.axes"], ["ragged.index"], name="ragged.index"),
        # [batch, seq, hidden] by [batch, 1, 1] -> [batch, 1, hidden]
        helper.make_node("GatherND", [pick.input[0], "ragged.index"], [output], name=LAST_POSITION, batch_dims=1),
    )
    graph.node.remove(pick)
    drop_unused_initializers(model)
