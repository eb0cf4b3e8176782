"""Random-weight checkpoints of published shapes: what speed and memory work needs when no weights can be fetched.

Speed depends on the shape alone; answers are noise, and the name of the checkpoint says so.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from edge_agent.errors import RefusedError
from export.checkpoint.source import CONFIG_NAME, TOKENIZER_NAME

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
    },
    "smollm2-360m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rms_norm_eps": 1e-6,
    },
    "ernie4.5-0.3b": {
        "model_type": "ernie4_5",
        "vocab_size": 103_424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
    },
    "pythia-160m": {
        "model_type": "gpt_neox",
        "vocab_size": 50_304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
"""Shapes of the published ``config.json`` files."""

_UNSAID = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
"""What shapes leave out: most tie head and embedding, and the tokenizer is ours."""

EOS = "<|eos|>"
TRAINED_TOKENS = 4096
SEED = 0

# Enough plain text for common words to become tokens; the rest of the vocabulary is filler that no text reaches.
_SUBJECTS = ("press", "mill", "robot", "oven", "pump", "conveyor", "valve", "bearing", "gearbox", "sensor", "spindle")
_FINDINGS = (
    "hydraulic pressure below setpoint",
    "temperature above limit",
    "vibration exceeds warning level",
    "no signal from encoder",
    "communication lost",
    "emergency stop pressed",
    "motor current too high",
    "Druck unter Sollwert",
    "Verbindung verloren",
)
_ENDINGS = ("for 12 s", "since 06:40", "after tool change", "three times this hour", "at 4.2 bar", "bei Schichtbeginn")


def synthesise(like: str, folder: Path, *, layers: int | None = None, **changes: Any) -> int:
    """Write a random checkpoint.

    Args:
        like: a key of `SHAPES`.
        folder: created; must be absent or empty.
        layers: other than the published number of layers.
        changes: further entries of the configuration (tests shrink a shape with them).

    Returns:
        Number of parameters.

    Raises:
        RefusedError: ``export.shape_unknown`` or ``export.out_exists``.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RefusedError("export.out_exists", f"{folder} is not empty")
    shape = _whole_shape(like, changes if layers is None else {"num_hidden_layers": layers, **changes})
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial") as partial:
        building = Path(partial)
        model.save_pretrained(building, safe_serialization=True)
        _name_plainly(building / CONFIG_NAME, like)
        make_tokenizer(int(shape["vocab_size"])).save(str(building / TOKENIZER_NAME))
        if folder.exists():
            folder.rmdir()
        shutil.copytree(building, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def count_parameters(like: str) -> int:
    """Parameters of a shape, counted without memory for a single weight.

    Raises:
        RefusedError: ``export.shape_unknown``.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_whole_shape(like, {})))
    return sum(parameter.numel() for parameter in model.parameters())


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with exactly ``vocab_size`` tokens, id 0 being `EOS`."""
    texts = [f"{subject}: {finding} {ending}" for subject, finding, ending in product(_SUBJECTS, _FINDINGS, _ENDINGS)]
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=min(vocab_size, TRAINED_TOKENS),
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    spec = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = spec["vocab"]
    merges = [tuple(pair) for pair in spec["merges"]]
    seeds = [token for token in vocabulary if token != EOS]
    lefts = list(seeds)
    for left in lefts:  # grows while it is walked
        for right in seeds:
            if len(vocabulary) < vocab_size and left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
                lefts.append(left + right)
        if len(vocabulary) == vocab_size:
            break
    filled = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
    filled.add_special_tokens([EOS])
    return filled


def _whole_shape(like: str, changes: dict[str, Any]) -> dict[str, Any]:
    if like not in SHAPES:
        raise RefusedError("export.shape_unknown", f"no shape {like!r}; there are: {', '.join(SHAPES)}")
    shape = {**_UNSAID, **SHAPES[like], **changes}
    if shape["model_type"] == "gemma3_text":
        # Five local layers to a global one, as published.
        count = shape["num_hidden_layers"]
        shape["layer_types"] = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(count)]
    return shape


def _byte_level(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _name_plainly(config_file: Path, like: str) -> None:
    config = json.loads(config_file.read_text("utf-8"))
    config["_name_or_path"] = f"random weights in the shape of {like}"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
