"""Activations, norms, scales and caches in float16, for GPUs: INT4 weights stay as they are.

Float16 ends at 65,504. What exceeds it becomes infinite and then NaN, and a model that was trained in bfloat16 may well
reach it in one layer. So the largest activations are measured on the task's own texts before the graph is rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edge_agent.errors import PermanentError, RefusedError
from export.graphs.graph import graph_shape
from export.graphs.ragged import QUERY_SEQLENS

LARGEST_HALF = 65_504.0
HEADROOM = 4.0
"""Texts of the plant may go further than those that were measured."""

_CACHES = ("past_key_values.", "present.")
_REAL_OUTPUTS = {"SkipSimplifiedLayerNormalization": (0, 3), "SkipLayerNormalization": (0, 3)}
"""Of operators whose other outputs exist for training only."""


def peak_activations(model: ModelProto, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Find how large every activation gets.

    Args:
        model: float32 or INT4 graph with float32 activations; small enough to be run from memory.
        texts: token ids of whole texts (prefix, event and answer) as the task will see them.

    Returns:
        Largest magnitude by tensor, keys and values included.

    Raises:
        RefusedError: ``export.half_unsuitable`` as `to_half`.
        PermanentError: ``export.graph_unloadable``.
    """
    _refuse_what_is_the_cpus(model)
    probed = ModelProto()
    probed.CopyFrom(model)
    names = _float_activations(probed)
    for number, name in enumerate(names):
        # On the graph's side: bringing every activation out would take gigabytes.
        probed.graph.node.append(helper.make_node("Abs", [name], [f"peak.{number}.abs"]))
        probed.graph.node.append(helper.make_node("ReduceMax", [f"peak.{number}.abs"], [f"peak.{number}"], keepdims=0))
        probed.graph.output.append(helper.make_tensor_value_info(f"peak.{number}", TensorProto.FLOAT, []))
    session = _session(probed)
    shape = graph_shape(model)
    empty = np.zeros((1, shape.num_kv_heads, 0, shape.head_dim), np.float32)
    caches = {value.name: empty for value in model.graph.input if value.name.startswith(_CACHES)}
    peaks = np.zeros(len(names))
    wanted = [f"peak.{number}" for number in range(len(names))]
    for ids in texts:
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64), **caches}
        peaks = np.maximum(peaks, np.array(session.run(wanted, feeds)))  # a NaN stays
    return dict(zip(names, peaks.tolist(), strict=True))


def check_headroom(peaks: dict[str, float]) -> float:
    """Refuse a model whose activations come near the end of float16.

    Args:
        peaks: of `peak_activations`.

    Returns:
        The largest magnitude.

    Raises:
        RefusedError: ``export.half_overflow`` naming the tensor.
    """
    name, peak = max(peaks.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not peak * HEADROOM <= LARGEST_HALF:
        raise RefusedError(
            "export.half_overflow",
            f"{name} reaches {peak:,.0f} on the task's texts; float16 ends at {LARGEST_HALF:,.0f}, and a factor of "
            f"{HEADROOM:g} must be left",
            tensor=name,
            peak=peak if math.isfinite(peak) else None,
        )
    return peak


def to_half(model: ModelProto) -> None:
    """Turn every float32 tensor of a graph into float16, in place.

    Caches become float16 at the border too; other inputs and outputs (``logits``, ``hidden``) stay float32 and are
    cast, so that the engine's interface is the same.

    Args:
        model: fused graph, fp32 or INT4.

    Raises:
        RefusedError: ``export.half_unsuitable`` for int8 caches and ragged batches, which are the CPU's;
            ``export.half_overflow`` for a weight that float16 cannot hold.
    """
    graph = model.graph
    _refuse_what_is_the_cpus(model)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(_half_tensor(tensor, tensor.name))
    for node in graph.node:
        _halve_attributes(node)
    for cache in _caches(model):
        cache.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]
    _cast_inputs(model, [value for value in graph.input if _is_float(value)])
    _cast_outputs(model, [value for value in graph.output if _is_float(value)])


def _caches(model: ModelProto) -> list[ValueInfoProto]:
    return [value for value in [*model.graph.input, *model.graph.output] if value.name.startswith(_CACHES)]


def _refuse_what_is_the_cpus(model: ModelProto) -> None:
    ragged = any(value.name == QUERY_SEQLENS for value in model.graph.input)
    if ragged or not all(map(_is_float, _caches(model))):
        raise RefusedError("export.half_unsuitable", "float16 graphs have neither int8 caches nor ragged batches")


def _float_activations(model: ModelProto) -> list[str]:
    """Names of all float32 tensors that nodes produce, asked of ONNX Runtime: it alone knows its own operators."""
    typeless = ModelProto()
    typeless.CopyFrom(model)
    given = {output.name for output in model.graph.output}
    for node in model.graph.node:
        kept = _REAL_OUTPUTS.get(node.op_type, range(len(node.output)))
        produced = [name for place, name in enumerate(node.output) if name and place in kept]
        typeless.graph.output.extend(ValueInfoProto(name=name) for name in produced if name not in given)
    return [output.name for output in _session(typeless).get_outputs() if output.type == "tensor(float)"]


def _session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # As it stands: an activation that a fusion swallows cannot be looked at.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise PermanentError("export.graph_unloadable", f"{model.graph.name}: {error}") from error


def _is_float(value: ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    wide = numpy_helper.to_array(tensor)
    largest = float(np.abs(wide).max(initial=0.0))
    if not largest <= LARGEST_HALF:
        raise RefusedError("export.half_overflow", f"{name} holds {largest:g}, which float16 cannot", tensor=name)
    return numpy_helper.from_array(wide.astype(np.float16), tensor.name)


def _halve_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_half_tensor(attribute.t, node.name))
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            number = numpy_helper.from_array(np.array(values, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", _half_tensor(number, node.name)))


def _cast_inputs(model: ModelProto, values: list[ValueInfoProto]) -> None:
    nodes = list(model.graph.node)
    casts = []
    for value in values:
        inner = f"{value.name}.half"
        for node in nodes:
            node.input[:] = [inner if name == value.name else name for name in node.input]
        casts.append(helper.make_node("Cast", [value.name], [inner], name=inner, to=TensorProto.FLOAT16))
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def _cast_outputs(model: ModelProto, values: list[ValueInfoProto]) -> None:
    for value in values:
        inner = f"{value.name}.half"
        for node in model.graph.node:
            node.input[:] = [inner if name == value.name else name for name in node.input]
            node.output[:] = [inner if name == value.name else name for name in node.output]
        model.graph.node.append(
            helper.make_node("Cast", [inner], [value.name], name=f"{value.name}.float", to=TensorProto.FLOAT)
        )
