"""Scales in half the bytes: stored as float16, widened to float32 once, when a session is made.

MatMulNBits computes in the type of its activations, and float32 scales cost a whole bit a weight at block 32. A Cast
of a stored tensor is folded by ONNX Runtime before the weights are packed for the CPU, so that what runs is the same
graph with the same numbers: 4.5 bits a weight in the file, as in a GGUF of type Q4_0.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.quantisation.block_weights import fits_float16

_WIDE_INPUTS = {
    # scales and zero points
    "MatMulNBits": slice(2, 4),
    "GatherBlockQuantized": slice(2, 4),
    # scales of the weights; that of the activations is one number
    "MatMulIntegerToFloat": slice(3, 4),
}


def compact_scales(model: ModelProto) -> int:
    """Store scales, and zero points that are floats, as float16; the last step before a graph is saved.

    Args:
        model: quantised graph, changed in place. A tensor with numbers that float16 cannot hold stays float32.

    Returns:
        Bytes saved.
    """
    wanted = {
        name
        for node in model.graph.node
        if node.op_type in _WIDE_INPUTS
        for name in node.input[_WIDE_INPUTS[node.op_type]]
    }
    # A table's scales reach its lookup through a Reshape.
    wanted |= {node.input[0] for node in model.graph.node if node.op_type == "Reshape" and node.output[0] in wanted}
    casts, saved = [], 0
    for tensor in model.graph.initializer:
        if tensor.name not in wanted or tensor.data_type != TensorProto.FLOAT:
            continue
        scales = numpy_helper.to_array(tensor)
        if not fits_float16(scales):
            continue
        wide = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(scales.astype(np.float16), f"{wide}.f16"))
        casts.append(helper.make_node("Cast", [tensor.name], [wide], name=f"{wide}.wide", to=TensorProto.FLOAT))
        saved += scales.nbytes // 2
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return saved
