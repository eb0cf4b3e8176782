"""Low-rank branches beside projections, whose matrices are inputs of the graph: ``y += (x @ A) @ B``.

A packed projection (query, key and value, or gate and up) gets one branch for all of its parts: the parts' A side by
side, and their B as blocks on a diagonal, in the order in which the projection packs them. Two small products and one
addition, whatever is packed, and the same numbers as apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from edge_agent.errors import PermanentError
from export.checkpoint.peft import LoraAdapter

Floats = npt.NDArray[np.float32]
_LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.")
_MODULE = re.compile(r"(?:[qkvo]|gate|up|down)_proj")
_PRODUCTS = frozenset({"MatMul", "MatMulNBits"})


@dataclass(frozen=True)
class Branch:
    """One projection of the graph that tasks may add to.

    Args:
        name: of its inputs, before ``.A`` and ``.B``.
        weights: the checkpoint's weights that it packs, in order.
    """

    name: str
    weights: tuple[str, ...]


def add_branches(model: ModelProto, adapters: Mapping[str, LoraAdapter]) -> tuple[Branch, ...]:
    """Give a graph the inputs that its adapters need.

    Args:
        model: fused graph, fp32 or quantised, changed in place.
        adapters: by task. A projection that none of them changes stays as it is.

    Returns:
        The branches, in order of evaluation.

    Raises:
        PermanentError: ``export.graph_unexpected`` when a changed weight has no projection of its own.
    """
    changed = {name for adapter in adapters.values() for name in adapter.updates}
    shapes = next(iter(adapters.values())).shapes
    found: list[Branch] = []
    for node in [node for node in model.graph.node if node.op_type in _PRODUCTS]:
        weights = _packed_weights(node)
        if not changed.isdisjoint(weights):
            found.append(_insert(model, node, weights, shapes))
    missing = sorted(changed - {name for branch in found for name in branch.weights})
    if missing:
        raise PermanentError("export.graph_unexpected", f"the graph has no projection by {missing[0]}")
    return tuple(found)


def packed_matrices(branches: tuple[Branch, ...], adapter: LoraAdapter) -> dict[str, Floats]:
    """One adapter's matrices as the graph's inputs.

    Args:
        branches: of `add_branches`.
        adapter: may leave branches, and parts of them, as they are.

    Returns:
        ``<branch>.A`` float32 [columns, rank] and ``<branch>.B`` float32 [rank, rows]; the rank is the sum over the
        parts that change. Branches that do not change are left out.
    """
    arrays: dict[str, Floats] = {}
    for branch in branches:
        parts = [(adapter.updates.get(name), adapter.shapes[name][0]) for name in branch.weights]
        rank = sum(update.down.shape[0] for update, _ in parts if update is not None)
        if not rank:
            continue
        columns = adapter.shapes[branch.weights[0]][1]
        down, up = np.zeros((columns, rank), np.float32), np.zeros((rank, sum(rows for _, rows in parts)), np.float32)
        first = row = 0
        for update, rows in parts:
            if update is not None:
                last = first + update.down.shape[0]
                down[:, first:last] = update.down.t().numpy()
                up[first:last, row : row + rows] = update.up.t().numpy()
                first = last
            row += rows
        arrays |= {f"{branch.name}.A": down, f"{branch.name}.B": up}
    return arrays


def _packed_weights(node: NodeProto) -> tuple[str, ...]:
    """The checkpoint's weights behind a product, by the name that packing gave to the graph's."""
    place = _LAYER.search(node.input[1])
    modules = _MODULE.findall(node.input[1])
    return () if place is None else tuple(f"{place[0]}{module}.weight" for module in modules)


def _insert(
    model: ModelProto, node: NodeProto, weights: tuple[str, ...], shapes: Mapping[str, tuple[int, int]]
) -> Branch:
    prefix, _, _ = weights[0].removesuffix(".weight").rpartition(".")
    name = f"lora.{prefix.removeprefix('model.layers.')}.{'+'.join(w.split('.')[-2] for w in weights)}"
    columns, rows = shapes[weights[0]][1], sum(shapes[weight][0] for weight in weights)
    sides: dict[str, list[str | int | None]] = {"A": [columns, f"{name}.rank"], "B": [f"{name}.rank", rows]}
    for side, dims in sides.items():
        model.graph.input.append(helper.make_tensor_value_info(f"{name}.{side}", TensorProto.FLOAT, dims))
    output = node.output[0]
    node.output[0] = f"{name}.base"
    nodes = [
        helper.make_node("MatMul", [node.input[0], f"{name}.A"], [f"{name}.low"], name=f"{name}.down"),
        helper.make_node("MatMul", [f"{name}.low", f"{name}.B"], [f"{name}.delta"], name=f"{name}.up"),
        helper.make_node("Add", [f"{name}.base", f"{name}.delta"], [output], name=f"{name}.sum"),
    ]
    place = next(number for number, one in enumerate(model.graph.node) if one.name == node.name)
    for offset, one in enumerate(nodes, start=1):
        model.graph.node.insert(place + offset, one)
    return Branch(name, weights)
