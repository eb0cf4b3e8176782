"""The checkpoint folder: what a Hugging Face Llama needs, and nothing that only our training knows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from edge_agent.errors import PermanentError

_CONFIGURATION_KEYS = frozenset(
    {
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)


def save_checkpoint(model: LlamaForCausalLM, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` (tied head stored once)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    # Only what describes the network: the library's own defaults and version do not belong to an artifact.
    configuration = {name: value for name, value in model.config.to_dict().items() if name in _CONFIGURATION_KEYS}
    configuration |= {"architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(configuration, indent=2, sort_keys=True) + "\n", "utf-8")
    generation = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")


def load_checkpoint(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint for evaluation in fp32.

    Raises:
        PermanentError: ``checkpoint.unreadable``.
    """
    try:
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise PermanentError("checkpoint.unreadable", f"cannot load checkpoint: {error}", path=str(folder)) from error
    model.eval()
    return model
