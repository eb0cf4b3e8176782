"""Scales in half the bytes: stored as float16, widened to float32 once, when a session is made.

MatMulNBits computes in the type of its activations, and float32 scales cost a whole bit a weight at block 32. A Cast
of a stored tensor is folded by ONNX Runtime before the weights are packed for the CPU, so that what runs is the same
graph with the same numbers: 4.5 bits a weight in the file, as in a GGUF of type Q4_0.

Folding costs every start of a session the time and the memory of the wide scales, so two kinds stay wide: those of
matrices with one scale an output, which are few, and those of an embedding that no head shares. Its table is mapped
from the file, and only the rows that events use are ever read.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.graphs.graph import drop_unused_initializers
from export.quantisation.block_weights import fits_float16

_WIDE_INPUTS = {
    # scales and zero points
    "MatMulNBits": slice(2, 4),
    "GatherBlockQuantized": slice(2, 4),
}


def compact_scales(model: ModelProto) -> int:
    """Store scales, and zero points that are floats, as float16; the last step before a graph is saved.

    Args:
        model: quantised graph, changed in place. A tensor with numbers that float16 cannot hold stays float32.

    Returns:
        Bytes saved.
    """
    looked_up = _store_as_looked_up(model)
    wanted = {
        name
        for node in model.graph.node
        if node.op_type in _WIDE_INPUTS
        for name in node.input[_WIDE_INPUTS[node.op_type]]
        if name not in looked_up
    }
    # A table's scales that a head reads as well reach the lookup through a Reshape.
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


def _store_as_looked_up(model: ModelProto) -> set[str]:
    """Give scales of a table that only a lookup reads the shape in which it reads them; returns their names."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    made_by = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    for lookup in [node for node in graph.node if node.op_type == "GatherBlockQuantized"]:
        for place in range(len(lookup.input))[_WIDE_INPUTS[lookup.op_type]]:
            reshape = made_by.get(lookup.input[place])
            if reshape is None or reshape.op_type != "Reshape":
                continue
            scales, shape = (stored.get(name) for name in reshape.input)
            if scales is None or shape is None or readers[scales.name] > 1:
                continue
            scales.dims[:] = numpy_helper.to_array(shape).tolist()
            lookup.input[place] = scales.name
            graph.node.remove(reshape)
            found.add(scales.name)
    drop_unused_initializers(model)
    return found
