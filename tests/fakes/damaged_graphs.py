"""Graphs that are right on short events and misbehave on long ones, inside ONNX Runtime's own kernels.

Golden examples and the reference events render to some 60 tokens; `LONG_EVENT` to more than `LONG_PASS_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from edge_agent.contract.event import Event

LONG_PASS_TOKENS = 110
LONG_EVENT: Event = {"machine": "press-4", "code": "E217", "text": "0x1F 9041 7732 " * 10}
_FOREVER = 1 << 40
# About 150 GFLOP on one thread, however many there are: seconds on any machine, and one node to the graph.
_WIDE = 6000

Damage = Callable[[Path], None]


def never_ends(decoder: Path) -> None:
    """A long pass goes round a loop of small nodes for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["body_go"], ["body_go_on"]),
            helper.make_node("Add", ["body_sum", "bad_zero_f"], ["body_next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("body_turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("body_go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("body_sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("body_go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("body_next", TensorProto.FLOAT, [1]),
        ],
    )
    _add_to_scores(
        decoder,
        [
            helper.make_node("Mul", ["bad_is_long", "bad_forever"], ["bad_turns"]),
            helper.make_node("Squeeze", ["bad_turns"], ["bad_trips"]),
            helper.make_node("Loop", ["bad_trips", "", "bad_zero_f"], ["bad_addend"], body=body),
        ],
    )


def one_long_kernel(decoder: Path) -> None:
    """A long pass takes a large matrix apart: seconds within a single node, which nothing can interrupt."""
    _add_to_scores(
        decoder,
        [
            helper.make_node("Mul", ["bad_is_long", "bad_wide"], ["bad_size"]),
            helper.make_node("Concat", ["bad_size", "bad_size"], ["bad_square"], axis=0),
            helper.make_node("ConstantOfShape", ["bad_square"], ["bad_matrix"]),  # float32 (0, 0) or (6000, 6000)
            helper.make_node("Det", ["bad_matrix"], ["bad_product"]),
            helper.make_node("ReduceSum", ["bad_product"], ["bad_sum"], keepdims=0),
            helper.make_node("Unsqueeze", ["bad_sum", "bad_zero"], ["bad_addend"]),
        ],
    )


def refuses(decoder: Path) -> None:
    """A long pass makes ONNX Runtime report a fault: two elements out of one."""
    _add_to_scores(
        decoder,
        [
            helper.make_node("Add", ["bad_is_long", "bad_one"], ["bad_shape"]),
            helper.make_node("Reshape", ["bad_zero_f", "bad_shape"], ["bad_addend"]),
        ],
    )


def no_number(decoder: Path) -> None:
    """A long pass scores everything NaN, and keeps NaN in the last layer's cache."""
    _spoil_long_passes(decoder, float("nan"))


def infinite(decoder: Path) -> None:
    """A long pass scores everything +inf."""
    _add_to_scores(decoder, _addend_when_long(float("inf")))


def all_the_same(decoder: Path) -> None:
    """A long pass drowns every difference between scores."""
    _add_to_scores(decoder, _addend_when_long(1e30))


def one_stray_score(decoder: Path) -> None:
    """A long pass scores NaN for one token, which no answer may begin with."""
    row = [0.0] * _rows(decoder)
    row[-1] = float("nan")
    _add_to_scores(decoder, _addend_when_long(*row))


def _addend_when_long(*values: float) -> list[onnx.NodeProto]:
    # Where, not Mul: NaN times zero is NaN on short passes too.
    return [
        helper.make_node(
            "Constant", [], ["bad_values"], value=helper.make_tensor("v", TensorProto.FLOAT, [len(values)], values)
        ),
        helper.make_node("Cast", ["bad_is_long"], ["bad_flag"], to=TensorProto.BOOL),
        helper.make_node("Where", ["bad_flag", "bad_values", "bad_zero_f"], ["bad_addend"]),
    ]


def _spoil_long_passes(decoder: Path, value: float) -> None:
    """Add ``value`` to the embeddings of a long pass: every key, value and score of it is spoilt."""
    model = onnx.load(str(decoder))
    taken = next(node for node in model.graph.node if "Gather" in node.op_type and "input_ids" in node.input)
    embedded = taken.output[0]
    taken.output[0] = "bad_embedded"
    at = list(model.graph.node).index(taken) + 1
    nodes = [
        *_is_long(),
        *_addend_when_long(value),
        helper.make_node("Add", ["bad_embedded", "bad_addend"], [embedded]),
    ]
    for offset, node in enumerate(nodes):
        model.graph.node.insert(at + offset, node)
    _save(model, decoder)


def _add_to_scores(decoder: Path, nodes: list[onnx.NodeProto]) -> None:
    model = onnx.load(str(decoder))
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "bad_logits"
    last = helper.make_node("Add", ["bad_logits", "bad_addend"], ["logits"])
    model.graph.node.extend([*_is_long(), *nodes, last])
    _save(model, decoder)


def _is_long() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Shape", ["input_ids"], ["bad_length"], start=1, end=2),  # (1,)
        helper.make_node("Sub", ["bad_length", "bad_limit"], ["bad_excess"]),
        helper.make_node("Clip", ["bad_excess", "bad_least", "bad_most"], ["bad_is_long"]),  # 0 or 1
    ]


def _save(model: Any, decoder: Path) -> None:
    numbers: dict[str, tuple[list[int], int]] = {
        "bad_limit": ([1], LONG_PASS_TOKENS),
        "bad_zero": ([1], 0),
        "bad_one": ([1], 1),
        "bad_least": ([], 0),
        "bad_most": ([], 1),
        "bad_forever": ([1], _FOREVER),
        "bad_wide": ([1], _WIDE),
    }
    for name, (shape, value) in numbers.items():
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, shape, [value]))
    model.graph.initializer.append(helper.make_tensor("bad_zero_f", TensorProto.FLOAT, [1], [0.0]))
    for leftover in decoder.parent.glob(f"{decoder.name}.data*"):
        leftover.unlink()
    onnx.save_model(model, str(decoder), save_as_external_data=False)


def _rows(decoder: Path) -> int:
    model = onnx.load(str(decoder), load_external_data=False)
    (scores,) = (output for output in model.graph.output if output.name == "logits")
    return int(scores.type.tensor_type.shape.dim[-1].dim_value)
