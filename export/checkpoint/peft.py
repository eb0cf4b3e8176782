"""A LoRA adapter as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.

Read without the library, and refused where anything is set that this reader does not know to be harmless: an adapter
that is half understood answers, only wrongly.

Source: PEFT, LoraConfig and `peft.tuners.lora.layer`; rank-stabilised scaling: Kalajdzievski 2023.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import sha256_file
from export.checkpoint.source import Checkpoint
from export.checkpoint.weights import read_json, tensor_shapes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ARCHITECTURES = frozenset({"ernie4_5", "exaone4", "gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
"""Those whose projections have llama's names; each is held against merged weights in transformers by a test."""

_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules"})
_DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""Say where an adapter came from or how it was trained, and change no number of it."""
_INITIALISATIONS = (None, True, False, "eva", "gaussian", "orthogonal")
"""Others (PiSSA, OLoRA, CorDA, LoftQ) change the weights beneath, so that the checkpoint is no longer the base."""


@dataclass(frozen=True)
class Update:
    """What one projection learnt: its weight [rows, columns] becomes weight + up @ down.

    Args:
        down: float32 [rank, columns].
        up: float32 [rows, rank], scaled.
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class LoraAdapter:
    """A checked adapter.

    Args:
        rank: of every update.
        updates: by the name of the checkpoint's weight.
        shapes: of every projection of the checkpoint, [rows, columns] by name.
        file_hashes: SHA-256 of both files, by name.
    """

    rank: int
    updates: dict[str, Update]
    shapes: dict[str, tuple[int, int]]
    file_hashes: dict[str, str]

    def as_facts(self) -> dict[str, Any]:
        """For the report card."""
        modules = sorted({name.split(".")[-2] for name in self.updates})
        numbers = sum(update.down.numel() + update.up.numel() for update in self.updates.values())
        return {"rank": self.rank, "modules": modules, "parameters": numbers, "files": dict(self.file_hashes)}


def open_adapter(path: Path, checkpoint: Checkpoint) -> LoraAdapter:
    """Read and check an adapter.

    Args:
        path: PEFT's folder.
        checkpoint: the base that it was trained on.

    Raises:
        RefusedError: ``adapter.unsupported`` for another architecture, another kind of adapter, or settings that
            change more than a low-rank product.
        PermanentError: ``adapter.invalid`` for missing or damaged files, and for matrices that do not fit the base.
    """
    if checkpoint.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise RefusedError("adapter.unsupported", f"{checkpoint.architecture}: adapters are taken for {known}")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise PermanentError("adapter.invalid", f"{path} holds no {name}", path=str(path))
    config = read_json(path / CONFIG_NAME, "adapter.invalid")
    _refuse_unknown(config)
    rank, scaling = _rank(config), _scaling(config)
    bases = {
        name: shape for name, shape in tensor_shapes(checkpoint.weight_files).items() if _PROJECTION.fullmatch(name)
    }
    shapes = {name: (shape[0], shape[1]) for name, shape in bases.items()}
    sides = _sides(path / WEIGHTS_NAME)
    updates = {}
    for name, (rows, columns) in shapes.items():
        down, up = sides.pop((name, "A"), None), sides.pop((name, "B"), None)
        if down is None and up is None:
            continue
        found = [None if side is None else tuple(side.shape) for side in (down, up)]
        if down is None or up is None or found != [(rank, columns), (rows, rank)]:
            raise PermanentError(
                "adapter.invalid",
                f"{name} needs ({rank}, {columns}) and ({rows}, {rank}), not {found[0]} and {found[1]}",
            )
        updates[name] = Update(down, scaling * up)
    if sides:
        raise RefusedError(
            "adapter.unsupported", f"it changes {next(iter(sides))[0]}, which is no projection of a layer"
        )
    _require_targets(config, updates)
    hashes = {name: sha256_file(path / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    return LoraAdapter(rank, updates, shapes, hashes)


def _refuse_unknown(config: dict[str, Any]) -> None:
    def refuse(what: str) -> RefusedError:
        return RefusedError("adapter.unsupported", f"{CONFIG_NAME}: {what}")

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type {config.get('peft_type')!r} is not LORA")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias {config['bias']!r} trains biases of the base")
    initialised = config.get("init_lora_weights")
    if not any(initialised is known or initialised == known for known in _INITIALISATIONS):
        raise refuse(f"init_lora_weights {initialised!r} changes the base")
    for name, value in config.items():
        if value and name not in _READ | _DESCRIPTIVE:
            raise refuse(f"{name} is set, and what it does is not supported")


def _rank(config: dict[str, Any]) -> int:
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise PermanentError("adapter.invalid", f"{CONFIG_NAME}: r must be a positive integer, not {rank!r}")
    return rank


def _scaling(config: dict[str, Any]) -> float:
    alpha, rank = config.get("lora_alpha"), _rank(config)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise PermanentError("adapter.invalid", f"{CONFIG_NAME}: lora_alpha must be a number, not {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _sides(file: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every matrix by (weight of the checkpoint, A or B), float32."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise PermanentError("adapter.invalid", f"{file.name} is not a whole safetensors file: {error}") from error
    return dict(_named(tensors))


def _named(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    for name, tensor in tensors.items():
        parts = _TENSOR.fullmatch(name)
        if parts is None or tensor.ndim != 2:
            raise RefusedError("adapter.unsupported", f"{name} is not a matrix of a low-rank product")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise PermanentError("adapter.invalid", f"{name} holds NaN, infinity or integers", tensor=name)
        yield (f"{parts['module']}.weight", parts["side"]), tensor.float()


def _require_targets(config: dict[str, Any], updates: dict[str, Update]) -> None:
    """A part of the promised matrices would be a damaged adapter that still answers."""
    targets = config.get("target_modules")
    found = {name.removesuffix(".weight") for name in updates}
    if not found:
        raise PermanentError("adapter.invalid", f"{WEIGHTS_NAME} holds no matrix")
    if not isinstance(targets, list):  # a pattern, or None: nothing to compare with
        return
    for target in map(str, targets):
        if not any(name == target or name.endswith(f".{target}") for name in found):
            raise PermanentError("adapter.invalid", f"{CONFIG_NAME} targets {target}, for which there is no matrix")
