"""From weights to the fused fp32 graph: graph interface 1 of `edge_agent.contract.manifest.ModelSpec`.

mobius builds the graph (GroupQueryAttention with rotary, packed QKV, SkipSimplifiedLayerNormalization); this module
feeds it a faithful configuration, checks what came out and keeps only the last position's logits.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any, Self, cast

import mobius
import numpy as np
import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.errors import PermanentError
from export.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint
from export.graphs.repairs import faithful_config, repair_graph

EMBEDDING = "model.embed_tokens.weight"
LOGITS = "logits"
LAST_HIDDEN = "last_hidden"
LAST_POSITION = "last_position"
HEAD_WEIGHT = "lm_head.weight_t"
Place = dict[str, str]
"""Of a tensor outside its graph: ``location``, ``offset`` and ``length``."""
EXTERNAL_FROM_BYTES = 64 << 20
"""Graphs above this size keep their weights in ``<name>.data``, which ONNX Runtime maps instead of copying."""

_INLINE_BYTES = 4096
_ALIGNED_BYTES = 64
"""ONNX Runtime maps from the page on in which a weight begins: whole pages between weights would be 1 % of a file."""
SHARD_BYTES = 64 << 20
"""Of a file of weights: a device hashes several side by side at every start, and fetches less anew after a fault."""


@dataclass(frozen=True)
class GraphShape:
    """What the engine must know to feed a graph."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def build_fp32(checkpoint: Checkpoint, max_context_tokens: int) -> ModelProto:
    """Build the fused fp32 graph with last-position logits.

    Args:
        checkpoint: a checked checkpoint.
        max_context_tokens: rotary tables are cut to this many positions.

    Returns:
        inputs ``input_ids`` int64 [batch, seq], ``attention_mask`` int64 [batch, past + seq],
        ``past_key_values.N.key|value`` float32 [batch, kv_heads, past, head_dim];
        outputs ``logits`` float32 [batch, 1, vocab] and ``present.N.key|value``.

    Raises:
        PermanentError: ``export.graph_failed``, ``export.tensor_missing``, ``export.rotary_missing`` or
            ``export.graph_unexpected``.
    """
    with tempfile.TemporaryDirectory(prefix="edge-export-", dir=_scratch_beside(checkpoint.path)) as scratch:
        view = Path(scratch)
        _write_view(checkpoint, view)
        model = _mobius_model(view)
    repair_graph(model, checkpoint)
    _check_rotary(model.graph.node)
    _strip_names_of_this_machine(model)
    _cut_rotary_tables(model, max_context_tokens)
    _keep_last_position(model)
    return model


def graph_shape(model: ModelProto) -> GraphShape:
    """Read layers, KV heads and head size off the graph's own inputs."""
    caches = [i for i in model.graph.input if i.name.startswith("past_key_values.") and i.name.endswith(".key")]
    dims = caches[0].type.tensor_type.shape.dim  # [batch, kv_heads, past, head_dim]
    return GraphShape(num_layers=len(caches), num_kv_heads=dims[1].dim_value, head_dim=dims[3].dim_value)


def head_node(model: ModelProto) -> NodeProto:
    """The node that produces the logits.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    return _producer(model, LOGITS)


def save_graph(model: ModelProto, path: Path, external_from_bytes: int = EXTERNAL_FROM_BYTES) -> list[Path]:
    """Write a graph; large weights go beside it.

    Returns:
        The files written.
    """
    return save_graphs({path: model}, external_from_bytes)


def save_graphs(
    models: dict[Path, ModelProto], external_from_bytes: int = EXTERNAL_FROM_BYTES, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write graphs of one folder, with every large weight once in files of the first: ``<first>.data``, ``.data.1``.

    Args:
        models: graph by path. Weights of one name must be the same weights.
        external_from_bytes: a single graph below this size keeps its weights inside.
        shard_bytes: beyond which another file of weights is begun.

    Returns:
        The files written.

    Raises:
        PermanentError: ``export.graph_unexpected`` when two graphs mean different weights by one name.
    """
    first, model = next(iter(models.items()))
    first.parent.mkdir(parents=True, exist_ok=True)
    if len(models) == 1 and sum(len(tensor.raw_data) for tensor in model.graph.initializer) < external_from_bytes:
        first.write_bytes(model.SerializeToString(deterministic=True))
        return [first]
    written: dict[str, tuple[bytes | None, Place]] = {}
    with _Shards(first, shard_bytes) as shards:
        for path, model in models.items():
            light = _without_weights(model)
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) < _INLINE_BYTES:
                    light.graph.initializer.append(tensor)
                    continue
                if tensor.name not in written:
                    place = shards.write(tensor.raw_data)
                    # Remembered where another graph may mean something else by the name; all of them are gigabytes.
                    written[tensor.name] = (tensor.raw_data if len(models) > 1 else None), place
                raw, place = written[tensor.name]
                if raw is not None and raw != tensor.raw_data:
                    raise PermanentError(
                        "export.graph_unexpected", f"two graphs mean different weights by {tensor.name}"
                    )
                outside = light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                outside.data_location = TensorProto.EXTERNAL
                for key, value in place.items():
                    outside.external_data.add(key=key, value=value)
            path.write_bytes(light.SerializeToString(deterministic=True))
    return [*models, *shards.files]


class _Shards:
    """The files of large weights: ``<graph>.data``, ``<graph>.data.1`` and so on."""

    def __init__(self, graph: Path, most_bytes: int) -> None:
        self._graph = graph
        self._most_bytes = most_bytes
        self._writer = self._begin(f"{graph.name}.data")
        self.files = [Path(self._writer.name)]
        self._written: dict[bytes, tuple[bytes, Place]] = {}

    def write(self, content: bytes) -> Place:
        """Append a tensor's bytes, unless a tensor begins with them; returns where they lie, as ONNX says it."""
        beginning = content[:_ALIGNED_BYTES]
        whole, place = self._written.get(beginning, (b"", {}))
        if whole.startswith(content):
            return {**place, "length": str(len(content))}
        if self._writer.tell() and self._writer.tell() + len(content) > self._most_bytes:
            self._writer.close()
            self._writer = self._begin(f"{self._graph.name}.data.{len(self.files)}")
            self.files.append(Path(self._writer.name))
        self._writer.write(bytes(-self._writer.tell() % _ALIGNED_BYTES))
        place = {"location": self.files[-1].name, "offset": str(self._writer.tell()), "length": str(len(content))}
        self._writer.write(content)
        self._written[beginning] = content, place
        return place

    def _begin(self, name: str) -> BufferedWriter:
        return (self._graph.parent / name).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _without_weights(model: ModelProto) -> ModelProto:
    # Not by onnx.save_model: it empties the model that it is given, and copying one above 2 GB is not possible.
    light = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    light.opset_import.extend(model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    return light


def load_graph(path: Path) -> ModelProto:
    """Read a graph that `save_graph` wrote, weights included.

    Not by onnx.load: it refuses weights with more than one hard link, and stages share files by linking them.

    Raises:
        PermanentError: ``export.graph_unexpected`` when weights lie outside the graph's folder or are cut short.
    """
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        name, length = place["location"], int(place["length"])
        if Path(name).name != name:
            raise PermanentError("export.graph_unexpected", f"{tensor.name} lies outside the graph's folder")
        with (path.parent / name).open("rb") as reader:
            reader.seek(int(place["offset"]))
            tensor.raw_data = reader.read(length)
        if len(tensor.raw_data) != length:
            raise PermanentError("export.graph_unexpected", f"{name} ends inside {tensor.name}")
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def stored_with_others(path: Path) -> frozenset[str]:
    """Names of weights that take no bytes of their own, because they are the beginning of another's.

    Args:
        path: a graph that `save_graph` wrote.
    """
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    longest: dict[tuple[str, str], tuple[int, str]] = {}
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, size = (place["location"], place["offset"]), (int(place["length"]), tensor.name)
        longest[start] = max(size, longest.get(start, size))
    return frozenset(tensor.name for tensor in outside) - {name for _, name in longest.values()}


def _scratch_beside(path: Path) -> Path | None:
    # Beside the checkpoint a hard link is possible; elsewhere gigabytes would be copied.
    return path.parent if os.access(path.parent, os.W_OK) else None


def _write_view(checkpoint: Checkpoint, view: Path) -> None:
    """A directory that holds exactly what was checked, with a configuration that mobius reads correctly."""
    (view / CONFIG_NAME).write_text(json.dumps(faithful_config(checkpoint)), "utf-8")
    index = checkpoint.path / INDEX_NAME
    for file in [*checkpoint.weight_files, *([index] if index.is_file() else [])]:
        try:
            # Not a symbolic link: mobius refuses weights that resolve to another folder.
            os.link(file, view / file.name)
        except OSError:
            shutil.copyfile(file, view / file.name)


def _mobius_model(view: Path) -> ModelProto:
    for chatty in ("mobius", "onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            package = mobius.build(str(view), execution_provider="cpu", dtype="f32")
            built = package["model"]
            missing = [name for name, value in built.graph.initializers.items() if value.const_value is None]
            if missing:
                raise PermanentError("export.tensor_missing", f"the checkpoint lacks {missing[0]}", tensors=missing[:8])
            return cast("ModelProto", onnx_ir.to_proto(built))
    except (ValueError, KeyError, RuntimeError, NotImplementedError, TypeError, OSError) as error:
        raise PermanentError("export.graph_failed", f"mobius could not build the graph: {error}") from error


def _check_rotary(nodes: Any) -> None:
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    if not attention:
        raise PermanentError("export.graph_unexpected", "the graph holds no fused attention")
    rotary_ops = any(node.op_type == "RotaryEmbedding" for node in nodes)
    for node in attention:
        fused = any(attribute.name == "do_rotary" and attribute.i == 1 for attribute in node.attribute)
        if not (fused or rotary_ops):
            raise PermanentError(
                "export.rotary_missing", f"{node.name} applies no position: its answers would be noise"
            )


def _strip_names_of_this_machine(model: ModelProto) -> None:
    """Drop what would make two equal builds differ (paths) and what no runtime reads."""
    graph = model.graph
    graph.name = "decoder"
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    # Portable bodies of contrib operators: ONNX Runtime has kernels for them, and bodies only slow the load.
    del model.functions[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def _cut_rotary_tables(model: ModelProto, max_context_tokens: int) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("cos_cache", "sin_cache")):
            table = numpy_helper.to_array(tensor)  # [positions, rotary_dim / 2]
            tensor.CopyFrom(numpy_helper.from_array(table[:max_context_tokens].copy(), tensor.name))


def _keep_last_position(model: ModelProto) -> None:
    graph = model.graph
    head = head_node(model)
    if head.op_type != "MatMul":
        raise PermanentError("export.graph_unexpected", f"logits come from {head.op_type}, not from a MatMul")
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last_position.index"))
    gather = helper.make_node(
        "Gather",
        [head.input[0], "last_position.index"],  # [batch, seq, hidden] -> [batch, 1, hidden]
        [LAST_HIDDEN],
        name=LAST_POSITION,
        axis=1,
    )
    head.input[0] = LAST_HIDDEN
    insert_before(model, head, gather)
    output = next(o for o in graph.output if o.name == LOGITS)
    sequence = output.type.tensor_type.shape.dim[1]
    sequence.ClearField("dim_param")
    sequence.dim_value = 1


def insert_before(model: ModelProto, anchor: NodeProto, *nodes: NodeProto) -> None:
    """Insert nodes just before ``anchor`` (order of nodes is order of evaluation in ONNX)."""
    position = next(i for i, node in enumerate(model.graph.node) if node.name == anchor.name)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def drop_unused_initializers(model: ModelProto) -> None:
    """Remove weights that no node reads any more."""
    used = {name for node in model.graph.node for name in node.input}
    for tensor in list(model.graph.initializer):
        if tensor.name not in used:
            model.graph.initializer.remove(tensor)


def int_attribute(node: NodeProto, name: str) -> int:
    """An integer attribute that is known to be there."""
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def _producer(model: ModelProto, tensor: str) -> NodeProto:
    for node in model.graph.node:
        if tensor in node.output:
            return cast("NodeProto", node)
    raise PermanentError("export.graph_unexpected", f"nothing in the graph produces {tensor}")
