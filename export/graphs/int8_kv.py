"""Key-value caches in int8: a quarter of the memory of fp32, by one scale per head and channel, measured on prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError, RefusedError
from export.graphs.graph import graph_shape

Floats = npt.NDArray[np.float32]
_SCALE_INPUTS = (12, 13)
"""Positions of ``k_scale`` and ``v_scale`` among the inputs of GroupQueryAttention."""
_LARGEST_INT8 = 127


def measure_kv_scales(model: ModelProto, prompts: Sequence[Sequence[int]]) -> dict[str, Floats]:
    """Find how large keys and values get.

    Args:
        model: graph with float caches and weights inside; small enough to be run from memory.
        prompts: token ids of whole texts (prefix, event and answer) as the task will see them.

    Returns:
        ``<layer>.key|value`` to scale, float32 [1, kv_heads, 1, head_dim]: the largest magnitude is 127 of them.

    Raises:
        RefusedError: ``export.calibration_missing`` without prompts: every key and value would be cut to nothing.
    """
    if not prompts:
        raise RefusedError("export.calibration_missing", "there is no text to measure the scales of int8 caches on")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = graph_shape(model)
    names = [f"{layer}.{half}" for layer in range(shape.num_layers) for half in ("key", "value")]
    empty = np.zeros((1, shape.num_kv_heads, 0, shape.head_dim), np.float32)
    largest = {name: np.zeros((1, shape.num_kv_heads, 1, shape.head_dim), np.float32) for name in names}
    for ids in prompts:
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            **{f"past_key_values.{name}": empty for name in names},
        }
        for name, cache in zip(names, session.run([f"present.{name}" for name in names], feeds), strict=True):
            np.maximum(largest[name], np.abs(cache).max(axis=2, keepdims=True), out=largest[name])
    return {name: np.maximum(found / _LARGEST_INT8, np.finfo(np.float32).tiny) for name, found in largest.items()}


def quantise_kv(model: ModelProto, scales: dict[str, Floats]) -> None:
    """Let a graph keep its caches in int8.

    Args:
        model: fp32 or INT4 graph, changed in place.
        scales: of `measure_kv_scales`.

    Raises:
        PermanentError: ``export.graph_unexpected`` when an attention node takes no cache of its own.
    """
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        layer = node.input[3].removeprefix("past_key_values.").removesuffix(".key")
        if f"{layer}.key" not in scales:
            raise PermanentError("export.graph_unexpected", f"{node.name} reads no cache of its own")
        missing = _SCALE_INPUTS[-1] + 1 - len(node.input)
        node.input.extend([""] * missing)
        for position, half in zip(_SCALE_INPUTS, ("key", "value"), strict=True):
            name = f"kv_scale.{layer}.{half}"
            model.graph.initializer.append(numpy_helper.from_array(scales[f"{layer}.{half}"], name))
            node.input[position] = name
        node.attribute.extend(
            [
                helper.make_attribute("k_quant_type", "PER_CHANNEL"),
                helper.make_attribute("v_quant_type", "PER_CHANNEL"),
                helper.make_attribute("kv_cache_bit_width", 8),
            ]
        )
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8
