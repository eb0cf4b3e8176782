"""The peer's file must be a fair one: complete, as llama.cpp reads it, and no larger than llama.cpp would make it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.bench.gguf_peer import GgufFile, default_mix_bytes, interleave_rotary, is_text, write_gguf

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB, LAYERS = 64, 2, 1, 96, 40, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
}
LETTERS = [chr(ord("a") + n) for n in range(26)]


def weights(config: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    kv = KV_HEADS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        rows = {"q_proj": HIDDEN, "k_proj": kv, "v_proj": kv, "o_proj": HIDDEN}
        for name, size in rows.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = (size, HIDDEN)
            if config["model_type"] == "qwen2" and name != "o_proj":
                shapes[f"{prefix}.self_attn.{name}.bias"] = (size,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = shapes[f"{prefix}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def checkpoint(folder: Path, **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    vocabulary = {"<|eos|>": 0, **{letter: number for number, letter in enumerate(LETTERS, start=1)}, "ab": 27}
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<|eos|>", "special": True}],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(weights(config), folder / "model.safetensors")
    return folder


def read(folder: Path, **changes: Any) -> tuple[GgufFile, gguf.GGUFReader]:
    written = write_gguf(checkpoint(folder, **changes), folder / "model.gguf")
    return written, gguf.GGUFReader(folder / "model.gguf")


def shown(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


@pytest.mark.parametrize(("model_type", "biases"), [("llama", 0), ("qwen2", 3)])
def test_no_weight_is_left_out_of_the_peers_file(tmp_path: Path, model_type: str, biases: int) -> None:
    _, reader = read(tmp_path, model_type=model_type)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(kinds) == 2 + LAYERS * (9 + biases)
    matrices = {name for name, kind in kinds.items() if kind == "Q4_0"}
    assert {"token_embd.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"} <= matrices
    assert set(kinds.values()) == {"Q4_0", "F32"}
    assert shown(reader, "general.architecture") == model_type


def test_the_peers_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    _, reader = read(tmp_path)
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    unpacked = gguf.quants.dequantize(table.data, table.tensor_type)  # [vocab, hidden]
    original = weights(CONFIG)["model.embed_tokens.weight"].numpy()
    # Half a step of the block's grid: the largest weight of 32 is eight steps away from zero.
    assert np.abs(unpacked - original).max() <= np.abs(original).max() / 8


def test_queries_and_keys_are_turned_the_way_llama_cpp_turns_them() -> None:
    weight = np.arange(8, dtype=np.float32).reshape(8, 1)  # 2 heads of 4: pairs are (0, 2), (1, 3), (4, 6), (5, 7)
    assert interleave_rotary(weight, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_peer_can_encode_text_itself(tmp_path: Path) -> None:
    _, reader = read(tmp_path)
    tokens, kinds = shown(reader, "tokenizer.ggml.tokens"), shown(reader, "tokenizer.ggml.token_type")
    assert tokens[:3] == ["<|eos|>", "a", "b"]
    assert len(tokens) == len(kinds) == VOCAB
    assert [kinds[0], kinds[1], kinds[28]] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]
    assert shown(reader, "tokenizer.ggml.merges") == ["a b"]


def test_four_and_a_half_bits_a_weight_and_not_more(tmp_path: Path) -> None:
    written, reader = read(tmp_path)
    matrix_weights = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.tensor_type.name == "Q4_0")
    norm_weights = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.tensor_type.name == "F32")
    assert written.tensor_bytes == matrix_weights * 18 // 32 + norm_weights * 4
    assert written.file_bytes == (tmp_path / "model.gguf").stat().st_size


@pytest.mark.parametrize(("hidden", "bits"), [(576, 8.5), (1024, 6.5625)])
def test_without_pure_the_peer_keeps_a_tied_embedding_at_more_bits(hidden: int, bits: float) -> None:
    rows = 1000
    written = GgufFile(10_000_000, 9_000_000, (rows, hidden))
    assert default_mix_bytes(written) - written.file_bytes == rows * hidden * (bits - 4.5) / 8


def test_an_architecture_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gemma3_text"):
        write_gguf(checkpoint(tmp_path, model_type="gemma3_text"), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("token", "text"),
    [("Ġcafe", True), ("Ã¼", True), ("Ã", True), ("eĀ", False), ("Ā", False), ("¼Ã", False), ("aÃ", False)],
)
def test_a_token_that_llama_cpps_grammar_would_misread_is_never_chosen(token: str, *, text: bool) -> None:
    assert is_text(token) is text
