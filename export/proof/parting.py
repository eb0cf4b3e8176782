"""Where does a graph leave the model? The residual stream after each block, held against transformers' own.

In every decoder the residual stream is one chain: the embedding, then one addition per block. Following that chain
needs no names of tensors, so it works for every architecture and for every fusion that keeps the additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto

from edge_agent.errors import PermanentError
from export.graphs.graph import EMBEDDING
from export.proof.recording import Floats, Recording

JUMP = 30.0
"""An error that grows by this factor over one block is that block's own; rounding grows slowly."""
ROUNDING = 1e-6
"""Relative error of an fp32 stream in which nothing is wrong; smaller ones are not told apart."""

_ADDITIONS = {"Add": 0, "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}
"""Operators that add to the stream, and which of their outputs is the sum."""

Part = Literal["embedding", "self_attn", "mlp", "layer", "head", "cache"]


@dataclass(frozen=True)
class Parting:
    """The first block of a graph that computes something else than transformers.

    Args:
        layer: its number from 0; None outside of the layers.
        part: ``self_attn`` or ``mlp`` where the block shows which, else ``layer``; ``embedding`` before the first
            layer; ``head`` when every layer agrees but the logits do not (final norm or output matrix); ``cache`` when
            the whole prefill agrees, so that only steps with a past are wrong.
        error: relative error of the stream behind it, 2-norm, worst position.
    """

    layer: int | None
    part: Part
    error: float

    def __str__(self) -> str:
        if self.layer is None:
            return {
                "embedding": "at the embedding",
                "head": "after the last layer (norm or head)",
                "cache": "only in steps with a past: every layer of the prefill agrees",
            }[self.part]
        return f"at layer {self.layer} ({self.part})"


def find_parting(graph: Path, recording: Recording) -> Parting:
    """Run the recorded prefill with the residual stream exposed, and name the first block that is wrong.

    Args:
        graph: the fused fp32 graph on disk; it is not changed.
        recording: what transformers computed.

    Returns:
        The first block whose error jumps.

    Raises:
        PermanentError: ``export.graph_unexpected`` when the graph's residual stream cannot be followed.
    """
    model = ModelProto.FromString(graph.read_bytes())
    stream = expose_stream(model)
    layers = recording.hidden.shape[0] - 1
    blocks = len(stream) - 1
    if blocks not in {layers, 2 * layers}:
        raise PermanentError(
            "export.graph_unexpected", f"{blocks} additions to the residual stream do not belong to {layers} layers"
        )
    *streams, logits = _run(model, graph.parent, recording, [*stream, "logits"])
    before = ROUNDING
    for (layer, part, expected), found in zip(_expected(recording, blocks), streams, strict=True):
        if expected is None:
            continue
        error = relative_error(found[0], expected)
        if error > JUMP * before:
            return Parting(layer, part, error)
        before = max(before, error)
    error = relative_error(logits[0, -1:], recording.logits[:1])
    return Parting(None, "head" if error > JUMP * before else "cache", error)


def expose_stream(model: ModelProto) -> list[str]:
    """Make the residual stream an output of the graph, in place.

    Returns:
        Names of the tensors [batch, seq, hidden]: before the first layer, then after each addition.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stream = [_stream_start(model, readers)]
    while (addition := _next_addition(stream[-1], readers)) is not None:
        place = _ADDITIONS[addition.op_type]
        addition.output.extend([""] * (place + 1 - len(addition.output)))
        addition.output[place] = addition.output[place] or f"stream.{len(stream)}"
        stream.append(addition.output[place])
    for name in stream:
        model.graph.output.add(name=name)
    return stream


def relative_error(found: Floats, expected: Floats) -> float:
    """Largest ||found - expected|| / ||expected|| over positions.

    Args:
        found: float32 [positions, width].
        expected: the same.
    """
    # By position: one with huge activations, as the first often is, must not hide the others.
    norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
    differences = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    error = float((differences / np.maximum(norms, np.finfo(np.float32).tiny)).max())
    # A stream that is no number is as wrong as can be; a comparison with NaN would let it pass.
    return error if np.isfinite(error) else float("inf")


def _expected(recording: Recording, blocks: int) -> Iterator[tuple[int | None, Part, Floats | None]]:
    """Layer, part and expectation of each tensor of the stream; an expectation of None is not compared."""
    yield None, "embedding", recording.hidden[0]
    halves = blocks == 2 * (recording.hidden.shape[0] - 1)
    for layer, after in enumerate(recording.hidden[1:]):
        if halves:
            yield layer, "self_attn", None if recording.middle is None else recording.middle[layer]
        yield layer, "mlp" if halves and recording.middle is not None else "layer", after


def _stream_start(model: ModelProto, readers: dict[str, list[NodeProto]]) -> str:
    lookup = next((n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == EMBEDDING), None)
    if lookup is None:
        raise PermanentError("export.graph_unexpected", f"nothing looks {EMBEDDING} up")
    # Scales and learned positions come before the stream splits into a block and the way around it.
    name: str = lookup.output[0]
    while len(readers.get(name, [])) == 1:
        name = readers[name][0].output[0]
    return name


def _next_addition(name: str, readers: dict[str, list[NodeProto]]) -> NodeProto | None:
    additions = [n for n in readers.get(name, []) if n.op_type in _ADDITIONS and name in n.input[:2]]
    return additions[0] if additions else None


def _run(model: ModelProto, folder: Path, recording: Recording, outputs: list[str]) -> list[Floats]:
    options = ort.SessionOptions()
    # The weights stay where they are: only the exposed graph goes in from memory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    length = recording.prefill_tokens
    feeds: dict[str, Any] = {
        "input_ids": recording.ids[None, :length],  # [1, prefill]
        "attention_mask": np.ones((1, length), np.int64),
    }
    for entry in model.graph.input:
        if entry.name.startswith("past_key_values."):
            dims = entry.type.tensor_type.shape.dim  # [batch, kv_heads, past, head_dim]
            feeds[entry.name] = np.zeros((1, dims[1].dim_value, 0, dims[3].dim_value), np.float32)
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found: list[Floats] = session.run(outputs, feeds)
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise PermanentError("export.graph_unloadable", f"with its residual stream exposed: {error}") from error
    return found
