"""A graph opened up for measuring: weights that can be exchanged, activations and logits of many positions seen.

The device's graph gives the last position's logits and takes its weights as constants. A probe of the same graph takes
the positions to score as an input and every large weight too, so that one session serves all measurements: nothing is
copied into it, and exchanging one matrix costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError, RefusedError
from export.graphs.graph import LOGITS, graph_shape, head_node

Floats = npt.NDArray[np.float32]
Text = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of what follows it; what follows is scored."""

THREADS = 2
_POSITIONS = "scored_positions"
_FED_FROM_BYTES = 4096


class Probe:
    """A graph with its weights beside it.

    Args:
        model: a graph of interface 1 with the head inside; it is not changed, and its weights are read once.
        watched: tensors whose values `run` returns beside the logits.
        scores: whether logits are wanted; without them the head, the largest matrix of a small model, is not run.
        exchangeable: whether weights are fed. A quantised graph keeps them inside: its kernels pack them at load.
        threads: intra-op threads.

    Raises:
        PermanentError: ``export.graph_unexpected`` or ``export.graph_unloadable``.
    """

    def __init__(
        self,
        model: ModelProto,
        watched: Sequence[str] = (),
        *,
        scores: bool = True,
        exchangeable: bool = True,
        threads: int = THREADS,
    ) -> None:
        self.weights: dict[str, npt.NDArray[Any]] = {}
        self._outputs = [*([LOGITS] if scores else []), *watched]
        opened = _opened(model, self.weights if exchangeable else None, self._outputs)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # "initializer appears in graph inputs": on purpose
        try:
            self._session = ort.InferenceSession(opened.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise PermanentError("export.graph_unloadable", f"the graph opened for measuring: {error}") from error
        shape = graph_shape(model)
        empty = np.zeros((1, shape.num_kv_heads, 0, shape.head_dim), np.float32)
        self._start = {
            f"past_key_values.{layer}.{part}": empty for layer in range(shape.num_layers) for part in ("key", "value")
        }

    def start(self) -> dict[str, Floats]:
        """Empty caches."""
        return dict(self._start)

    def prefill(self, ids: Sequence[int], past: Mapping[str, Floats]) -> dict[str, Floats]:
        """Caches after ``ids``; nothing is scored."""
        names = [name.replace("past_key_values", "present") for name in past]
        outputs = self._session.run(names, self._feeds(ids, past, [len(ids) - 1]))
        return dict(zip(past, outputs, strict=True))

    def run(
        self,
        ids: Sequence[int],
        past: Mapping[str, Floats],
        positions: Sequence[int],
        exchanged: Mapping[str, Floats] | None = None,
    ) -> dict[str, Floats]:
        """Run ``ids`` after ``past``.

        Args:
            ids: new tokens.
            past: caches of what came before.
            positions: of the new tokens, whose logits are wanted.
            exchanged: weights to take in place of the graph's own, by initializer name.

        Returns:
            ``logits`` float32 [1, positions, vocab], and the watched tensors of all new tokens, by name.
        """
        feeds = self._feeds(ids, past, positions) | dict(exchanged or {})
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def _feeds(self, ids: Sequence[int], past: Mapping[str, Floats], positions: Sequence[int]) -> dict[str, Any]:
        length = next(iter(past.values())).shape[2] + len(ids)
        return {
            "input_ids": np.array([ids], np.int64),  # [1, seq]
            "attention_mask": np.ones((1, length), np.int64),  # [1, past + seq]
            _POSITIONS: np.array(positions, np.int64),
            **past,
            **self.weights,
        }


def common_prefix(texts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all texts begin with, less one: of every text at least one token is left."""
    shortest = min(len(text) for text in texts)
    same = next((at for at in range(shortest) if len({text[at] for text in texts}) > 1), shortest)
    return list(texts[0][: max(0, min(same, shortest - 1))])


def require_texts(texts: Sequence[Any], purpose: str) -> None:
    """Refuse to measure on nothing.

    Raises:
        RefusedError: ``export.calibration_missing``.
    """
    if not texts:
        raise RefusedError(
            "export.calibration_missing",
            f"{purpose} needs the task's own texts: give the task golden or labelled events",
        )


def _opened(model: ModelProto, weights: dict[str, npt.NDArray[Any]] | None, outputs: Sequence[str]) -> ModelProto:
    opened = ModelProto(ir_version=model.ir_version)
    opened.opset_import.extend(model.opset_import)
    graph = opened.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(output for output in model.graph.output if output.name != LOGITS)
    index = _last_position(opened)
    if LOGITS not in outputs:
        # ONNX Runtime computes what nobody asks for, so it must not be there.
        graph.node.remove(head_node(opened))
        used = {name for node in graph.node for name in node.input}
        for node in [n for n in graph.node if n.op_type == "Transpose" and n.output[0] not in used]:
            graph.node.remove(node)
    used = {name for node in graph.node for name in node.input} - {index.input[1]}
    for tensor in model.graph.initializer:
        if tensor.name not in used:
            continue
        if weights is None or len(tensor.raw_data) < _FED_FROM_BYTES:
            graph.initializer.append(tensor)
            continue
        weights[tensor.name] = numpy_helper.to_array(tensor)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    index.input[1] = _POSITIONS
    graph.input.append(helper.make_tensor_value_info(_POSITIONS, TensorProto.INT64, ["positions"]))
    for name in outputs:
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return opened


def _last_position(model: ModelProto) -> NodeProto:
    """The Gather that keeps the last position in front of the head."""
    wanted = head_node(model).input[0]
    for node in model.graph.node:
        if wanted in node.output and node.op_type == "Gather":
            found: NodeProto = node
            return found
    raise PermanentError("export.graph_unexpected", "no Gather of the last position stands before the head")
