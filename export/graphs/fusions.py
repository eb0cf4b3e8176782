"""Fewer and larger kernels in the fused fp32 graph, with the same numbers.

Every pattern is found by its structure, never by a name: what does not match is left as it is. Fusions run before
quantisation, so that one MatMulNBits comes of one MatMul; a column is quantised by itself, so packing columns side by
side changes none of them.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graphs.graph import drop_unused_initializers, insert_before


def fuse_projections(model: ModelProto) -> int:
    """Multiply once where several projections read the same input: gate and up, or query, key and value.

    Args:
        model: fused fp32 graph, changed in place. Projections [K, N1], [K, N2], … become one of [K, N1 + N2 + …] and a
            Split of its result.

    Returns:
        Number of MatMuls that are gone.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    uses: dict[str, int] = defaultdict(int)
    siblings: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            uses[name] += 1
        if node.op_type == "MatMul" and node.input[1] in weights:
            siblings[node.input[0]].append(node)
    gone = 0
    for nodes in siblings.values():
        # A weight that something else reads too (a tied embedding) must stay as it is.
        group = [node for node in nodes if uses[node.input[1]] == 1 and len(weights[node.input[1]].dims) == 2]
        if len(group) > 1:
            _fuse(model, group, [weights[node.input[1]] for node in group])
            gone += len(group) - 1
    drop_unused_initializers(model)
    return gone


def _fuse(model: ModelProto, group: list[NodeProto], weights: list[TensorProto]) -> None:
    widths = [int(tensor.dims[1]) for tensor in weights]
    # The ending is what the quantiser knows transposed weights by.
    name = _joined([tensor.name.removesuffix("_t") for tensor in weights], ".") + "_t"
    packed = np.concatenate([numpy_helper.to_array(tensor) for tensor in weights], axis=1)  # [K, sum of widths]
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(packed), name))
    sizes = f"split_sizes.{'_'.join(map(str, widths))}"
    if all(tensor.name != sizes for tensor in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(np.array(widths, np.int64), sizes))
    joined = _joined([node.name for node in group], "/")
    product = helper.make_node("MatMul", [group[0].input[0], name], [f"{joined}.packed"], name=joined)
    parts = [node.output[0] for node in group]
    split = helper.make_node("Split", [f"{joined}.packed", sizes], parts, name=f"{joined}.split", axis=-1)
    insert_before(model, group[0], product, split)
    for node in group:
        model.graph.node.remove(node)


def _joined(names: list[str], separator: str) -> str:
    """Siblings under one name: ``mlp.gate_proj.weight``, ``mlp.up_proj.weight`` -> ``mlp.gate_proj+up_proj.weight``."""
    parts = [name.split(separator) for name in names]
    shortest = min(map(len, parts))
    before = next((n for n in range(shortest) if len({part[n] for part in parts}) > 1), shortest)
    after = next((n for n in range(shortest - before) if len({part[-1 - n] for part in parts}) > 1), 0)
    middle = "+".join(separator.join(part[before : len(part) - after]) for part in parts)
    return separator.join([*parts[0][:before], middle, *parts[0][len(parts[0]) - after :]])
