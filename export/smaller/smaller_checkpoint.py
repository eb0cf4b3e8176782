"""Checkpoints that are changed here: loaded for training, written as the plain folders that they came as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM

from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import copy_durable, write_atomic
from export.checkpoint.source import CONFIG_NAME, SINGLE_NAME, TOKENIZER_NAME, Checkpoint

Model = Any
"""A causal language model of transformers with the members of the Llama family: ``model.layers``, ``lm_head``."""

PRUNING_NAME = "pruning.json"
DISTILLATION_NAME = "distillation.json"

_KEPT_FILES = (TOKENIZER_NAME, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_TIED_HEAD = "lm_head.weight"


def new_model(config: Mapping[str, Any], seed: int) -> Model:
    """A model with random weights.

    Args:
        config: entries of ``config.json``.
        seed: of the weights.

    Raises:
        RefusedError: ``export.student_invalid`` for a shape that transformers does not accept.
    """
    entries = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    try:
        parsed = AutoConfig.for_model(config["model_type"], **entries)
        model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation="eager")
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise RefusedError("export.student_invalid", f"transformers refuses the shape: {error}") from error
    return model.eval()


def write_checkpoint(model: Model, config: Mapping[str, Any], parent: Checkpoint, folder: Path) -> int:
    """Write ``config.json``, ``model.safetensors`` and the parent's tokenizer.

    Args:
        model: the weights.
        config: entries of ``config.json``; what they say of the number format decides how weights are stored.
        parent: whose tokenizer it is.
        folder: exists and is empty.

    Returns:
        Number of stored weights.

    Raises:
        EdgeError: ``disk.*``.
    """
    stored = _stored_dtype(config)
    tied = bool(model.config.tie_word_embeddings)
    tensors = {
        # A copy: what is tied or a view would be stored twice or not at all.
        name: tensor.detach().to(stored).clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if not (tied and name == _TIED_HEAD)
    }
    for name in _KEPT_FILES:
        if (parent.path / name).is_file():
            copy_durable(parent.path / name, folder / name)
    write_atomic(folder / SINGLE_NAME, save(tensors, metadata={"format": "pt"}), mode=0o644)
    write_atomic(folder / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), mode=0o644)
    return sum(tensor.numel() for tensor in tensors.values())


def write_provenance(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write what was done as JSON beside the weights; no clock, path or host name in it."""
    write_atomic(folder / name, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(), mode=0o644)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What pruning and distillation left in a checkpoint's folder, by file name; empty for any other checkpoint.

    Raises:
        PermanentError: ``export.config_invalid``.
    """
    found: dict[str, Any] = {}
    for name in (PRUNING_NAME, DISTILLATION_NAME):
        if (folder / name).is_file():
            try:
                found[name] = json.loads((folder / name).read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise PermanentError("export.config_invalid", f"{name}: {error}") from error
    return found


def parent_facts(parent: Checkpoint) -> dict[str, Any]:
    """What says which checkpoint this one was made from."""
    return {
        "sha256": parent.sha256,
        "architecture": parent.architecture,
        "parameters": parent.parameters,
        "layers": int(parent.config["num_hidden_layers"]),
    }


def _stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32
