"""The peer's file: a checkpoint as llama.cpp would hold it, written with llama.cpp's own Python package.

    python -m tests.bench.gguf_peer CHECKPOINT OUT.gguf            # Q4_0
    python -m tests.bench.gguf_peer CHECKPOINT OUT.gguf --type f16  # what llama-quantize starts from

Every matrix, the embedding too, is Q4_0 (18 bytes for 32 weights), as ``llama-quantize --pure`` makes it; norms and
biases are F32; tokens and merges are inside. Without ``--pure`` llama-quantize keeps a tied embedding at more bits
(`default_mix_bytes`): comparing with that would flatter us.

Source: llama.cpp, ``convert_hf_to_gguf.py`` (LlamaModel, Qwen2Model) and ``llama-quant.cpp``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from edge_agent.runtime.spelling import byte_level_alphabet

Floats = npt.NDArray[np.float32]

EMBEDDING = "token_embd.weight"
TYPES = {
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
_SUPER_BLOCK = 256
_BYTES = {character: bytes([byte]) for character, byte in byte_level_alphabet().items()}
_ZERO_BYTE = "\u0100"
"""As byte-level BPE writes it."""


@dataclass(frozen=True)
class GgufFile:
    """What was written.

    Args:
        file_bytes: the whole file.
        tensor_bytes: its weights alone, without tokens, merges and padding.
        embedding_shape: [vocab, hidden].
    """

    file_bytes: int
    tensor_bytes: int
    embedding_shape: tuple[int, int]


def write_gguf(checkpoint: Path, out: Path, kind: str = "q4_0") -> GgufFile:
    """Write a checkpoint.

    Args:
        checkpoint: folder with config.json, one model.safetensors and a byte-level BPE tokenizer.json.
        out: the file.
        kind: of the matrices, a key of `TYPES`.

    Returns:
        Sizes.

    Raises:
        ValueError: an architecture or a tensor that this writer does not know.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if config["model_type"] not in _ARCHITECTURES:
        raise ValueError(f"no GGUF conversion for {config['model_type']!r}")
    architecture = _ARCHITECTURES[config["model_type"]]
    matrix_type, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text("utf-8")), config)
    tensor_bytes = 0
    embedding_shape = (0, 0)
    for name, weight in _tensors(checkpoint, config, architecture):
        stored = matrix_type if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(weight, stored)
        if name == EMBEDDING:
            embedding_shape = (weight.shape[0], weight.shape[1])
        tensor_bytes += packed.nbytes
        writer.add_tensor(name, packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(out.stat().st_size, tensor_bytes, embedding_shape)


def default_mix_bytes(written: GgufFile) -> int:
    """Size of the same file as ``llama-quantize`` makes it without ``--pure``.

    A tied embedding is the output head as well, and is kept at Q6_K, or at Q8_0 where a row is no multiple of 256.
    """
    rows, hidden = written.embedding_shape
    kind = gguf.GGMLQuantizationType.Q8_0 if hidden % _SUPER_BLOCK else gguf.GGMLQuantizationType.Q6_K
    return written.file_bytes + rows * (_row_bytes(hidden, kind) - _row_bytes(hidden, gguf.GGMLQuantizationType.Q4_0))


def _row_bytes(weights: int, kind: gguf.GGMLQuantizationType) -> int:
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return weights // block_weights * block_bytes


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("bench")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    model = tokenizer["model"]
    special = {entry["id"] for entry in tokenizer["added_tokens"] if entry["special"]}
    by_id = {number: token for token, number in model["vocab"].items()}
    by_id.update({entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]})
    # The embedding may have more rows than there are tokens.
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config["vocab_size"])]
    kinds = [_token_type(token, known=n in by_id, special=n in special) for n, token in enumerate(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _token_type(token: str, *, known: bool, special: bool) -> gguf.TokenType:
    if special:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.NORMAL if known and is_text(token) else gguf.TokenType.UNUSED


def is_text(token: str) -> bool:
    """Whether llama.cpp's grammar reads a token as what it is: one byte, or UTF-8 without a zero byte.

    It takes a token for its text up to the first zero byte, and stumbles over broken UTF-8. No text has such tokens;
    a synthetic vocabulary has thousands, and random weights choose them.
    """
    if len(token) == 1:
        return token != _ZERO_BYTE
    text = b"".join(_BYTES.get(character, character.encode()) for character in token)
    try:
        return "\0" not in text.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _tensors(checkpoint: Path, config: dict[str, Any], architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, Floats]]:
    """Weights under their GGUF names, one at a time: [out, in] or [size]."""
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        for source in sorted(weights.keys()):
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ValueError(f"GGUF has no name for {source}")
            weight: Floats = weights.get_tensor(source).float().numpy()
            if architecture == gguf.MODEL_ARCH.LLAMA and source.endswith(("q_proj.weight", "k_proj.weight")):
                which = "num_attention_heads" if source.endswith("q_proj.weight") else "num_key_value_heads"
                weight = interleave_rotary(weight, config[which])
            yield name, weight


def interleave_rotary(weight: Floats, heads: int) -> Floats:
    """Rows of a query or key projection in the order of llama.cpp's rotation, which turns neighbours.

    Args:
        weight: [heads * head_dim, hidden], where the rotation pairs row i of a head with row i + head_dim / 2.
        heads: of this projection.

    Returns:
        The same rows, paired rows side by side.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring); prints what was written as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gguf_peer")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    arguments = parser.parse_args(argv)
    written = write_gguf(arguments.checkpoint, arguments.out, arguments.type)
    print(
        json.dumps(
            {
                "file_bytes": written.file_bytes,
                "tensor_bytes": written.tensor_bytes,
                "default_mix_bytes": default_mix_bytes(written),
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
