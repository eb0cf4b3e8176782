"""What mobius 0.1.0 gets wrong, put right here and only here; the parity check against transformers is the judge.

- A configuration with rope_theta 10000 and no rope_scaling is read as "no positions": the graph has no rotary
  embedding at all, and nothing warns.
- Gemma: the embedding's scale, the root of the hidden size, is rounded (to half precision or two decimals).
- Gemma 3: global layers are given the local layers' rotary tables, and local layers lose their window.
- ERNIE 4.5 turns neighbouring pairs of a head, not halves; its configuration does not say so, only its code does.
- GPT-NeoX keeps its own names for what every other graph calls ``model.embed_tokens`` and ``lm_head``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper, numpy_helper

from edge_agent.errors import PermanentError, RefusedError
from export.checkpoint.source import Checkpoint

_EMBEDDING = "model.embed_tokens.weight"
_OWN_NAMES = (
    ("gpt_neox.embed_in.", "model.embed_tokens."),
    ("gpt_neox/embed_in/", "model/embed_tokens/"),
    ("gpt_neox.", "model."),
    ("gpt_neox/", "model/"),
    (".attention.", ".self_attn."),
    ("/attention/", "/self_attn/"),
    ("embed_out", "lm_head"),
)
"""GPT-NeoX's names and ours, in the order in which they are replaced."""


def faithful_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's configuration in words that mobius reads as they are meant.

    Raises:
        RefusedError: ``export.architecture_unsupported`` for a Gemma 3 with scaled positions.
    """
    config: dict[str, Any] = {**checkpoint.config, "dtype": "float32"}
    config.pop("torch_dtype", None)
    if checkpoint.architecture == "gemma3_text":
        if config.get("rope_scaling") is not None:
            raise RefusedError("export.architecture_unsupported", "gemma3_text with rope_scaling (4B and larger)")
    elif config.get("rope_scaling") is None:
        # The default type says the same as None, aloud.
        config["rope_scaling"] = {"rope_type": "default"}
    if checkpoint.architecture == "ernie4_5":
        config["rope_interleave"] = True
    return config


def repair_graph(model: ModelProto, checkpoint: Checkpoint) -> None:
    """Put a fresh graph right, in place."""
    match checkpoint.architecture:
        case "gemma" | "gemma3_text":
            _restore_embedding_scale(model, int(checkpoint.config["hidden_size"]))
            if checkpoint.architecture == "gemma3_text":
                _restore_gemma3_attention(model, checkpoint.config)
        case "gpt_neox":
            _rename_own_names(model)


def _restore_embedding_scale(model: ModelProto, hidden_size: int) -> None:
    rows = next(n.output[0] for n in model.graph.node if n.op_type == "Gather" and n.input[0] == _EMBEDDING)
    scale = next((n for n in model.graph.node if n.op_type == "Mul" and rows in n.input), None)
    if scale is None:
        raise PermanentError("export.graph_unexpected", "the graph does not scale its embedding")
    rounded = next(t for t in model.graph.initializer if t.name == scale.input[1 - list(scale.input).index(rows)])
    rounded.CopyFrom(numpy_helper.from_array(np.array(math.sqrt(hidden_size), np.float32), rounded.name))


def _rename_own_names(model: ModelProto) -> None:
    def ours(name: str) -> str:
        for theirs, our in _OWN_NAMES:
            name = name.replace(theirs, our)
        return name

    for tensor in model.graph.initializer:
        tensor.name = ours(tensor.name)
    for node in model.graph.node:
        node.name = ours(node.name)
        node.input[:] = [ours(name) for name in node.input]
        node.output[:] = [ours(name) for name in node.output]


def _restore_gemma3_attention(model: ModelProto, config: dict[str, Any]) -> None:
    kinds: list[str] = config["layer_types"]
    tables = ("rotary.global.cos_cache", "rotary.global.sin_cache")
    if "full_attention" in kinds:
        cos, sin = _rotary_tables(
            float(config["rope_theta"]), int(config["head_dim"]), config["max_position_embeddings"]
        )
        model.graph.initializer.append(numpy_helper.from_array(cos, tables[0]))
        model.graph.initializer.append(numpy_helper.from_array(sin, tables[1]))
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    for node, kind in zip(attention, kinds, strict=True):
        if kind == "full_attention":
            node.input[7], node.input[8] = tables
        elif not any(attribute.name == "local_window_size" for attribute in node.attribute):
            node.attribute.append(helper.make_attribute("local_window_size", int(config["sliding_window"])))


def _rotary_tables(
    theta: float, head_dim: int, positions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosine and sine, each float32 [positions, head_dim / 2]."""
    frequencies = 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim))
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
