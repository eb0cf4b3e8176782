"""Several ways on from the same place in one pass: the inputs ``position_ids`` and ``attention_bias``.

GroupQueryAttention counts positions from the end of what came before, and lets every token see all before it. Told its
positions, and which of the tokens before it a token must not see, it runs what would follow a yes and what would follow
a no side by side, as if each were alone.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper

POSITION_IDS, ATTENTION_BIAS = "position_ids", "attention_bias"
_POSITION_IDS_INPUT, _ATTENTION_BIAS_INPUT = 9, 10
"""Places of the optional inputs among those of GroupQueryAttention."""


def add_alternatives(model: ModelProto) -> bool:
    """Give a graph the inputs ``position_ids`` int64 [batch, seq] and ``attention_bias`` float [1, 1, seq, past + seq].

    The bias is added to the scores of attention: 0 where a token may see a position, far below any score where not.

    Args:
        model: graph of interface 1 for CPUs, changed in place; fp32 or quantised.

    Returns:
        Whether it was changed. A layer with a sliding window counts positions by itself and would count them wrong; one
        that does not turn by positions would not be told them. Int8 caches are for texts that are written token by
        token, where the bias costs 4 % of a pass and alternatives gain nothing.
    """
    graph = model.graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention or any(_has_window(node) or not _turns(node) or _has_int8_caches(node) for node in attention):
        return False
    for node in attention:
        node.input.extend([""] * (_ATTENTION_BIAS_INPUT + 1 - len(node.input)))
        node.input[_POSITION_IDS_INPUT] = POSITION_IDS
        node.input[_ATTENTION_BIAS_INPUT] = ATTENTION_BIAS
    batch, seq = (dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim)
    graph.input.extend(
        [
            helper.make_tensor_value_info(POSITION_IDS, TensorProto.INT64, [batch, seq]),
            helper.make_tensor_value_info(ATTENTION_BIAS, TensorProto.FLOAT, [1, 1, seq, "total"]),
        ]
    )
    return True


def _has_window(node: NodeProto) -> bool:
    return any(attribute.name == "local_window_size" and attribute.i > 0 for attribute in node.attribute)


def _has_int8_caches(node: NodeProto) -> bool:
    return any(attribute.name == "k_quant_type" and attribute.s not in {b"", b"NONE"} for attribute in node.attribute)


def _turns(node: NodeProto) -> bool:
    """Whether it turns queries and keys by their positions itself."""
    return any(attribute.name == "do_rotary" and attribute.i == 1 for attribute in node.attribute)
