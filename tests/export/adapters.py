"""LoRA adapters as PEFT writes them, with random matrices that change a tiny model's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.checkpoint.peft import CONFIG_NAME, WEIGHTS_NAME
from export.checkpoint.source import open_checkpoint
from export.checkpoint.weights import tensor_shapes

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft_config(modules: tuple[str, ...] = MODULES, **changes: Any) -> dict[str, Any]:
    """What PEFT 0.17 writes for an ordinary adapter."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/base-model",
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(modules),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        **changes,
    }


def make_adapter(
    folder: Path, checkpoint: Path, *, modules: tuple[str, ...] = MODULES, seed: int = 1, **changes: Any
) -> Path:
    """Write an adapter of ``checkpoint``; ``changes`` go into its configuration."""
    config = peft_config(modules, **changes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(tensor_shapes(open_checkpoint(checkpoint).weight_files).items()):
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in modules:
            rows, columns = shape
            down = torch.randn((config["r"], columns), generator=generator) / columns**0.5
            up = torch.randn((rows, config["r"]), generator=generator) * 0.5
            # Contiguous and of their own: safetensors writes no shared memory.
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return folder
