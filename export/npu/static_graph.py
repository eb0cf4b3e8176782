"""From the portable graph to static windows: graph interface 2 of `edge_agent.contract.manifest.ModelSpec`.

Accelerators' compilers want every shape fixed. The portable graph is folded with its shapes fixed, and four things are
rewritten that they cannot take or that would cost them much:

- the causal mask, built inside from 0 and -3.4e38, becomes the input ``attention_bias`` (0 or `MASKED_BIAS`): a 16-bit
  tensor that holds -3.4e38 has no room for anything else, and Qualcomm's compiler ends with a misleading memory error;
- sine and cosine become tables that ``position_ids`` look up: in 16 bits an angle of 500 radians is off
  by half a degree;
- ``present`` holds the new positions alone: what the host already has need not travel back;
- token and position ids are int32, the widest integer that NPUs index with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_agent.contract.manifest import ModelSpec, StaticWindow
from edge_agent.errors import PermanentError, RefusedError
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.graphs.graph import LOGITS, GraphShape, graph_shape, load_graph, save_graph

BIAS = "attention_bias"
POSITIONS = "position_ids"
TOKENS = "input_ids"
_MASK = "attention_mask"
_EXTERNAL_FROM_BYTES = 1024


@dataclass(frozen=True)
class StaticShape:
    """The fixed sizes.

    Args:
        past_tokens: positions that the past window holds, and so the longest text.
        windows: tokens a pass of each graph, widest first.
    """

    past_tokens: int
    windows: tuple[int, ...] = (64, 1)

    def __post_init__(self) -> None:
        if list(self.windows) != sorted(set(self.windows), reverse=True) or not self.windows or self.windows[-1] < 1:
            raise RefusedError("export.static_shape", f"windows {self.windows} are not positive and falling")
        if self.windows[0] > self.past_tokens:
            raise RefusedError(
                "export.static_shape", f"a window of {self.windows[0]} exceeds the past of {self.past_tokens} tokens"
            )


def build_windows(checkpoint: Checkpoint, portable: Path, shape: StaticShape, folder: Path) -> ModelSpec:
    """Build the static fp32 graphs of a checkpoint.

    Args:
        checkpoint: where the portable graph came from.
        portable: as written by `export.npu.portable.export_portable`.
        shape: the fixed sizes.
        folder: receives ``model/window-<tokens>.onnx``.

    Returns:
        How the engine must feed them (graph interface 2).

    Raises:
        RefusedError: ``export.static_shape`` when the model cannot see as far back as the window reaches.
        PermanentError: ``export.graph_unexpected``.
    """
    _check_reach(checkpoint, shape)
    windows = [StaticWindow(graph=f"model/window-{tokens}.onnx", tokens=tokens) for tokens in shape.windows]
    caches = GraphShape(0, 0, 0)
    for window in windows:
        model = build_static(portable, window.tokens, shape.past_tokens)
        save_graph(model, folder / window.graph)
        caches = graph_shape(model)
    return ModelSpec(
        graph_interface=2,
        decoder=windows[0].graph,
        windows=tuple(windows),
        past_tokens=shape.past_tokens,
        tokenizer=TOKENIZER_NAME,
        architecture=checkpoint.architecture,
        precision="fp32",
        vocab_size=checkpoint.vocab_size,
        num_layers=caches.num_layers,
        num_kv_heads=caches.num_kv_heads,
        head_dim=caches.head_dim,
        max_context_tokens=shape.past_tokens,
        bos_token_id=checkpoint.bos_token_id,
        eos_token_id=checkpoint.eos_token_id,
    )


def build_static(portable: Path, tokens: int, past_tokens: int) -> ModelProto:
    """Make one window of the portable graph.

    Args:
        portable: the portable graph.
        tokens: positions a pass.
        past_tokens: positions of the past window.

    Returns:
        The graph, weights inside.

    Raises:
        PermanentError: ``export.graph_unexpected`` when the graph is not a decoder as optimum exports it.
    """
    model = _folded(portable, tokens, past_tokens)
    _bias_as_input(model, tokens, past_tokens)
    _tabulate_rotary(model, tokens, past_tokens)
    _new_positions_only(model, tokens)
    _drop_dead(model)
    _int32_ids(model)
    _keep_used_opsets(model)
    return model


def _check_reach(checkpoint: Checkpoint, shape: StaticShape) -> None:
    reach = checkpoint.max_positions
    if checkpoint.config.get("use_sliding_window", True):
        # Layers with a sliding window would need a second bias; within the window both are the same.
        reach = min(reach, checkpoint.config.get("sliding_window") or reach)
    if shape.past_tokens > reach:
        raise RefusedError(
            "export.static_shape",
            f"a past of {shape.past_tokens} tokens exceeds the {reach} that every layer of this model sees",
        )


def _folded(portable: Path, tokens: int, past_tokens: int) -> ModelProto:
    """The graph after ONNX Runtime has fixed the shapes and computed all that depends on them alone."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    sizes = {
        "batch_size": 1,
        "sequence_length": tokens,
        "past_sequence_length": past_tokens,
        "past_sequence_length + sequence_length": past_tokens + tokens,
    }
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    with tempfile.TemporaryDirectory(prefix=".static-", dir=portable.parent) as scratch:
        target = Path(scratch) / "folded.onnx"
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.data")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_FROM_BYTES)
        )
        try:
            # Biases stay operators of their own, so that each tensor between operators can have a scale of its own.
            ort.InferenceSession(
                str(portable), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise PermanentError("export.graph_unexpected", f"the portable graph cannot be folded: {error}") from error
        return load_graph(target)


def _bias_as_input(model: ModelProto, tokens: int, past_tokens: int) -> None:
    """Feed the mask of every softmax from one input."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    if not softmaxes:
        raise PermanentError("export.graph_unexpected", "the graph has no softmax: it is not a decoder")
    for softmax in softmaxes:
        add = producers.get(softmax.input[0])
        if add is None or add.op_type != "Add":
            raise PermanentError("export.graph_unexpected", f"{softmax.name}: no mask is added before it")
        # Scores depend on the mask as well, through the layers below, but on the tokens too.
        masks = [i for i, name in enumerate(add.input) if {TOKENS, _MASK} & _needed(graph.node, [name]) == {_MASK}]
        if len(masks) != 1:
            raise PermanentError("export.graph_unexpected", f"{add.name} does not add the mask to the scores")
        add.input[masks[0]] = BIAS
    kept = [value for value in graph.input if value.name != _MASK]
    del graph.input[:]
    graph.input.extend(kept)
    shape = [1, 1, tokens, past_tokens + tokens]
    graph.input.insert(2, helper.make_tensor_value_info(BIAS, TensorProto.FLOAT, shape))


def _tabulate_rotary(model: ModelProto, tokens: int, positions: int) -> None:
    """Replace every sine and cosine of positions by a row of a table."""
    graph = model.graph
    waves = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    if not waves:
        raise PermanentError("export.rotary_missing", "the graph applies no position: its answers would be noise")
    for node in waves:
        if _needed(graph.node, node.input) & {TOKENS, POSITIONS, _MASK} != {POSITIONS}:
            raise PermanentError("export.graph_unexpected", f"{node.name} depends on more than {POSITIONS}")
    tables = _evaluate(model, [node.output[0] for node in waves], tokens, positions)
    for node, table in zip(waves, tables, strict=True):
        graph.initializer.append(numpy_helper.from_array(table, f"{node.output[0]}.table"))
        lookup = helper.make_node("Gather", [f"{node.output[0]}.table", POSITIONS], node.output, name=node.name, axis=0)
        node.CopyFrom(lookup)  # [positions, head_dim] at [1, T] -> [1, T, head_dim]


def _evaluate(model: ModelProto, names: Sequence[str], tokens: int, positions: int) -> list[npt.NDArray[np.float32]]:
    """Values of tensors that depend on positions alone, for 0 .. positions - 1: float32 [positions, head_dim] each."""
    part = ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.name = "rotary"
    needed = _needed(model.graph.node, names)
    part.graph.node.extend(node for node in model.graph.node if node.output[0] in needed)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    part.graph.input.append(next(value for value in model.graph.input if value.name == POSITIONS))
    part.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    rows: list[list[Any]] = [[] for _ in names]
    for start in range(0, positions, tokens):
        ids = np.arange(start, start + tokens, dtype=np.int64)[None]  # [1, T]
        for found, wave in zip(rows, session.run(None, {POSITIONS: ids}), strict=True):
            found.append(wave[0])  # [T, head_dim]
    return [np.concatenate(found)[:positions] for found in rows]


def _new_positions_only(model: ModelProto, tokens: int) -> None:
    """Give out what is appended to the past instead of past and new together."""
    graph = model.graph
    for output in graph.output:
        if output.name == LOGITS:
            continue
        concat = next((node for node in graph.node if output.name in node.output), None)
        past = output.name.replace("present", "past_key_values")
        if concat is None or concat.op_type != "Concat" or len(concat.input) != 2 or concat.input[0] != past:
            raise PermanentError("export.graph_unexpected", f"{output.name} is not the past with something appended")
        whole, new = f"{output.name}.whole", concat.input[1]
        for node in graph.node:
            _rename(node.input, output.name, whole)
            _rename(node.input, new, output.name)
            _rename(node.output, output.name, whole)
            _rename(node.output, new, output.name)
        output.type.tensor_type.shape.dim[2].dim_value = tokens


def _int32_ids(model: ModelProto) -> None:
    for value in model.graph.input:
        if value.name in (TOKENS, POSITIONS):
            value.type.tensor_type.elem_type = TensorProto.INT32
    # After `_drop_dead`: what only the mask and the angles needed is gone.
    for node in model.graph.node:
        if node.op_type != "Gather" and {TOKENS, POSITIONS} & set(node.input):
            raise PermanentError("export.graph_unexpected", f"{node.name} takes ids and is not a lookup")


def _drop_dead(model: ModelProto) -> None:
    needed = _needed(model.graph.node, _outputs(model))
    alive = [node for node in model.graph.node if any(name in needed for name in node.output)]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(alive)
    model.graph.initializer.extend(weights)


def _keep_used_opsets(model: ModelProto) -> None:
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _outputs(model: ModelProto) -> list[str]:
    return [output.name for output in model.graph.output]


def _needed(nodes: Iterable[NodeProto], names: Iterable[str]) -> set[str]:
    """Every tensor that ``names`` depend on, themselves included."""
    producers = {name: node for node in nodes for name in node.output}
    needed: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in producers:
            left.extend(producers[name].input)
    return needed


def _rename(names: Any, old: str, new: str) -> None:
    for position, name in enumerate(names):
        if name == old:
            names[position] = new
