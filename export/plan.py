"""What a build will do and need, before it does it: ``--dry-run``, and the check of free space."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from edge_agent.fs import require_space
from export.boards import Board
from export.checkpoint.source import Checkpoint
from export.quantisation.int8_rows import LABEL
from export.quantisation.quantize import QuantSettings
from export.request import BuildRequest
from export.tasks import TaskFolder

TORCH_BYTES = 700 << 20
"""torch, transformers, onnx and onnxruntime, imported and idle."""
LAYER_NODES_BYTES = 12 << 10
"""A layer's nodes and their attributes, without any weight."""
WORKER_BYTES = 120 << 20
"""The device's worker with its libraries, before a model is loaded."""
RECORDED_POSITIONS = 89
"""Prefill and decode positions whose logits and hidden states the reference stage keeps."""


@dataclass(frozen=True)
class Weights:
    """Sizes of a checkpoint, from its headers.

    Args:
        matrices: elements of two-dimensional weights, embedding and head left out.
        table: elements of the embedding.
        head: elements of an untied head; 0 where it is the embedding.
        vectors: elements of everything else (norms, biases).
    """

    matrices: int
    table: int
    head: int
    vectors: int

    @property
    def elements(self) -> int:
        """All of them."""
        return self.matrices + self.table + self.head + self.vectors


@dataclass(frozen=True)
class Step:
    """One stage of the plan.

    Args:
        stage: its name.
        does: what, in words.
        writes_bytes: estimate of its outputs.
        ram_bytes: estimate of its peak memory.
    """

    stage: str
    does: str
    writes_bytes: int
    ram_bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole build.

    Args:
        target: the board.
        steps: in order.
        device_ram_bytes: what the worker on the device is expected to need.
        device_budget_bytes: what the target allows.
        free_bytes: on the disk that is written to.
    """

    target: str
    steps: tuple[Step, ...]
    device_ram_bytes: int
    device_budget_bytes: int
    free_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Work folder and bundle together."""
        return sum(step.writes_bytes for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "disk_bytes": self.disk_bytes}


def weigh(checkpoint: Checkpoint) -> Weights:
    """Read sizes from the headers of the weight files."""
    matrices = table = head = vectors = 0
    for file in checkpoint.weight_files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                shape = weights.get_slice(name).get_shape()
                count = prod(shape)
                if name.endswith("embed_tokens.weight"):
                    table += count
                elif name.startswith("lm_head."):
                    head += count
                elif len(shape) == 2:
                    matrices += count
                else:
                    vectors += count
    tied = bool(checkpoint.config.get("tie_word_embeddings", checkpoint.architecture.startswith("gemma")))
    return Weights(matrices, table, 0 if tied else head, vectors)


def int4_bytes(weights: Weights, settings: QuantSettings) -> int:
    """Size of the INT4 graph: four bits a weight, and the scale that a block shares."""
    shared_bits = 16 + (4 if settings.method == "k_quant" else 0)  # the block's scale, and its zero point
    bits = 4 + shared_bits / settings.block_size
    return int((weights.matrices + weights.table + weights.head) * bits / 8) + 4 * weights.vectors


def int8_bytes(weights: Weights, settings: QuantSettings) -> int:
    """Size of the graph with projections in eight bits: a byte a weight, embedding and head as in the INT4 graph.

    The scales, one an output, are left out: two bytes beside hundreds.
    """
    return weights.matrices + int4_bytes(replace(weights, matrices=0), settings)


def plan(
    request: BuildRequest, checkpoint: Checkpoint, board: Board, tasks: Sequence[TaskFolder], free_bytes: int
) -> Plan:
    """Estimate a build.

    Args:
        request: what is asked for.
        checkpoint: checked.
        board: the target.
        tasks: checked.
        free_bytes: on the disk that is written to.
    """
    weights = weigh(checkpoint)
    structure_bytes = _structure_bytes(checkpoint, request.max_context_tokens)
    fp32_bytes = shipped_bytes = 4 * weights.elements + structure_bytes
    golden = sum(len(task.golden) for task in tasks)
    hidden = int(checkpoint.config["hidden_size"]) * (int(checkpoint.config["num_hidden_layers"]) + 1)
    recording_bytes = 4 * RECORDED_POSITIONS * (checkpoint.vocab_size + hidden)
    steps = [
        Step("source", f"check {checkpoint.architecture}, {checkpoint.parameters:,} parameters", 0, TORCH_BYTES),
        *_shrinking(request, weights),
        Step("reference", "record what transformers answers", recording_bytes, TORCH_BYTES + fp32_bytes),
        Step("fuse", "fused fp32 graph, held against the recording", fp32_bytes, TORCH_BYTES + 3 * fp32_bytes),
    ]
    if request.adapters:
        does = f"{len(request.adapters)} adapter(s), held against merged weights"
        steps.append(Step("adapt", does, 2 * fp32_bytes, TORCH_BYTES + 3 * fp32_bytes))
    if request.sweep_s is not None:
        steps.append(Step("sweep", f"combinations for {request.sweep_s:.0f} s", 0, TORCH_BYTES + 4 * fp32_bytes))
    if board.source == "portable":
        steps.append(Step("portable", "standard operators, by optimum", fp32_bytes, TORCH_BYTES + 3 * fp32_bytes))
        shipped_bytes = int(len(board.window_tokens) * fp32_bytes * _share_of_fp32(request.precision))
    if request.precision == "int4":
        shipped_bytes = int4_bytes(weights, request.quantisation) + structure_bytes
        steps.append(Step("quantise", request.quantisation.label, shipped_bytes, TORCH_BYTES + 3 * fp32_bytes))
    if request.precision == "int8":
        shipped_bytes = int8_bytes(weights, request.quantisation) + structure_bytes
        steps.append(Step("quantise", LABEL, shipped_bytes, TORCH_BYTES + 3 * fp32_bytes))
    steps += [
        Step("specialise", f"for {board.name}", shipped_bytes, TORCH_BYTES + 2 * shipped_bytes),
        Step(
            "prove", f"{golden} golden examples, {len(tasks)} task(s)", 0, TORCH_BYTES + fp32_bytes + 2 * shipped_bytes
        ),
        Step("package", "report card, manifest, signature", shipped_bytes, TORCH_BYTES),
    ]
    return Plan(board.name, tuple(steps), 2 * shipped_bytes + WORKER_BYTES, board.memory_budget_bytes, free_bytes)


def _shrinking(request: BuildRequest, weights: Weights) -> list[Step]:
    """A student or what is left of the model, with gradients and the optimiser's two means."""
    if request.shrinking is None:
        return []
    what = f"drop {request.shrinking.drop_layers} layer(s)" if request.shrinking.drop_layers else "teach a student"
    return [Step("shrink", f"{what}, train", 4 * weights.elements, TORCH_BYTES + 20 * weights.elements)]


def _share_of_fp32(precision: str) -> float:
    """Size of a weight beside four bytes."""
    return {"a16w8": 0.25, "a16w4": 0.14}.get(precision, 1.0)


def _structure_bytes(checkpoint: Checkpoint, max_context_tokens: int) -> int:
    """Nodes, and the rotary tables (cosine and sine of half a head for each position)."""
    config = checkpoint.config
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    tables_bytes = 4 * head_dim * min(max_context_tokens, checkpoint.max_positions)
    return int(config["num_hidden_layers"]) * LAYER_NODES_BYTES + tables_bytes


def free_bytes_at(path: Path) -> int:
    """Free space where ``path`` is, or will be made."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def require_work_space(estimate: Plan, work: Path) -> None:
    """Refuse a build that would fill the disk, before its first byte.

    Args:
        estimate: the plan.
        work: where it writes; what earlier builds have left there may be reused and is not asked for again.

    Raises:
        TransientError: ``disk.full`` with both numbers.
    """
    existing = next(path for path in (work, *work.parents) if path.exists())
    left_bytes = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    require_space(existing, max(0, estimate.disk_bytes - left_bytes))


def plan_lines(estimate: Plan) -> list[str]:
    """The plan as a table for people."""
    lines = [f"{'stage':<11} {'writes':>10} {'memory':>10}  what"]
    lines += [
        f"{step.stage:<11} {readable_bytes(step.writes_bytes):>10} {readable_bytes(step.ram_bytes):>10}  {step.does}"
        for step in estimate.steps
    ]
    disk, free = readable_bytes(estimate.disk_bytes), readable_bytes(estimate.free_bytes)
    ram, budget = readable_bytes(estimate.device_ram_bytes), readable_bytes(estimate.device_budget_bytes)
    lines.append(f"disk {disk} of {free} free; on the device about {ram} of memory ({estimate.target} allows {budget})")
    return lines


def readable_bytes(count: int) -> str:
    """``0.3 MB``, ``86 MB``, ``2.1 GB``."""
    value = count / 1e6
    if value >= 1000:
        return f"{value / 1000:.1f} GB"
    return f"{value:.0f} MB" if value >= 10 else f"{value:.1f} MB"
