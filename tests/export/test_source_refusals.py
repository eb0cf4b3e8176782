"""Every checkpoint that must not become a bundle, each with its own code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from edge_agent.errors import EdgeError
from export.checkpoint.source import open_checkpoint
from tests.export.conftest import Build, change_config, change_weights


def code_of(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(EdgeError) as caught:
        open_checkpoint(checkpoint, **options)
    return caught.value.code


def split(checkpoint: Path) -> tuple[Path, Path]:
    """The weights as two shards with an index."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    files = [checkpoint / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weight_map = {}
    for file, part in zip(files, (names[:7], names[7:]), strict=True):
        save_file({name: weights[name] for name in part}, file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file.name))
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files[0], files[1]


def test_whole_checkpoint_is_described(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    assert checkpoint.architecture == "llama"
    assert checkpoint.bos_token_id is None
    assert checkpoint.eos_token_id == 0
    assert set(checkpoint.file_hashes) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert checkpoint.sha256 == open_checkpoint(llama).sha256


def test_absent_checkpoint_is_named(tmp_path: Path) -> None:
    assert code_of(tmp_path / "nowhere") == "export.checkpoint_missing"


def test_pickled_weights_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    # A pickle that would run code; it stays closed, so its content does not matter.
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    assert code_of(checkpoint) == "export.pickle_refused"


def test_pickle_named_by_the_index_is_refused(checkpoint: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001.bin"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of(checkpoint) == "export.pickle_refused"


def test_missing_weights_are_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert code_of(checkpoint) == "export.weights_missing"


def test_missing_shard_is_named(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EdgeError) as caught:
        open_checkpoint(checkpoint)
    assert caught.value.code == "export.shard_missing"
    assert "model-00002-of-00002.safetensors" in caught.value.detail


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd.safetensors", "sub/model.safetensors", "model.txt"]
)
def test_index_that_leaves_the_folder_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert code_of(checkpoint) == "export.index_invalid"


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert code_of(checkpoint) == "export.weights_corrupt"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(checkpoint: Path, poison: float) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = poison

    change_weights(checkpoint, change)
    with pytest.raises(EdgeError) as caught:
        open_checkpoint(checkpoint)
    assert caught.value.code == "export.nan_weights"
    assert caught.value.context["tensor"] == "model.norm.weight"


def test_infinities_that_cancel_are_still_found(checkpoint: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = float("inf")
        weights["model.norm.weight"][4] = float("-inf")

    change_weights(checkpoint, change)
    assert code_of(checkpoint) == "export.nan_weights"


def test_missing_tensor_is_refused(checkpoint: Path, make_bundle: Build, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", checkpoint=checkpoint)
    assert caught.value.code == "export.tensor_missing"
    assert "mlp.up_proj" in caught.value.detail


def test_tensor_of_another_shape_is_refused(checkpoint: Path, make_bundle: Build, tmp_path: Path) -> None:
    change_config(checkpoint, intermediate_size=256)
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", checkpoint=checkpoint)
    assert caught.value.code == "export.reference_failed"


@pytest.mark.parametrize("architecture", ["mamba", "t5", None, "../llama"])
def test_unknown_architecture_is_refused(checkpoint: Path, architecture: str | None) -> None:
    change_config(checkpoint, model_type=architecture)
    assert code_of(checkpoint) == "export.architecture_unsupported"


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"model_type": "llama", "vocab_size": -1}'])
def test_broken_config_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    assert code_of(checkpoint) == "export.config_invalid"


def test_config_without_end_token_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, eos_token_id=None)
    assert code_of(checkpoint) == "export.config_invalid"


def test_tokenizer_larger_than_the_model_is_refused(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_tokens(["<one-too-many>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert code_of(checkpoint) == "export.vocab_mismatch"


def test_broken_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"model": 1}')
    assert code_of(checkpoint) == "export.tokenizer_invalid"


def test_missing_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert code_of(checkpoint) == "export.tokenizer_missing"


def test_checkpoint_above_one_billion_is_refused_by_its_header_alone(checkpoint: Path) -> None:
    # A sparse file: a header that promises 1.2 billion weights, and no block of data on disk.
    count = 1_200_000_000
    header = json.dumps({"w": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (checkpoint / "model.safetensors").open("wb") as writer:
        writer.write(len(header).to_bytes(8, "little") + header)
        writer.truncate(8 + len(header) + 2 * count)
    assert code_of(checkpoint) == "export.too_large"


def test_large_checkpoint_is_welcome_when_asked_for(checkpoint: Path) -> None:
    count = 1_200_000_000
    header = json.dumps({"w": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (checkpoint / "model.safetensors").open("wb") as writer:
        writer.write(len(header).to_bytes(8, "little") + header)
        writer.truncate(8 + len(header) + 2 * count)
    (checkpoint / "tokenizer.json").unlink()
    # The next check speaks, so the size was accepted; the weights are not read.
    assert code_of(checkpoint, allow_large=True) == "export.tokenizer_missing"


# --- shards --------------------------------------------------------------------------------------------------------


def test_sharded_checkpoint_is_whole(checkpoint: Path) -> None:
    parameters = open_checkpoint(checkpoint).parameters
    shards = split(checkpoint)
    opened = open_checkpoint(checkpoint)
    assert opened.weight_files == shards
    assert opened.parameters == parameters


def test_missing_shard_of_two_is_named(checkpoint: Path) -> None:
    split(checkpoint)[1].unlink()
    assert code_of(checkpoint) == "export.shard_missing"


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_shard_is_refused(checkpoint: Path, kept: float) -> None:
    shard = split(checkpoint)[1]
    raw = shard.read_bytes()
    shard.write_bytes(raw[: int(len(raw) * kept)])
    assert code_of(checkpoint) == "export.weights_corrupt"


def test_shards_without_their_index_are_refused(checkpoint: Path) -> None:
    split(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    assert code_of(checkpoint) == "export.index_invalid"


def test_shard_of_another_download_is_refused(checkpoint: Path) -> None:
    first, second = split(checkpoint)
    shutil.copyfile(first, second)
    assert code_of(checkpoint) == "export.tensor_missing"


def test_nan_in_the_last_shard_is_found(checkpoint: Path) -> None:
    shard = split(checkpoint)[1]
    weights = load_file(shard)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, shard)
    assert code_of(checkpoint) == "export.nan_weights"


# --- code of its own -----------------------------------------------------------------------------------------------


def test_checkpoint_that_names_its_own_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, auto_map={"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"})
    assert code_of(checkpoint) == "export.remote_code_refused"
    # Trust is for data, never for code.
    assert code_of(checkpoint, trust=True, scratch=tmp_path) == "export.remote_code_refused"


@pytest.mark.parametrize("name", ["modeling_tiny.py", "configuration_tiny.py", "tokenization_tiny.py"])
def test_checkpoint_that_brings_python_files_is_refused_and_they_stay_closed(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(f"open({str(checkpoint / 'ran')!r}, 'w')")
    assert code_of(checkpoint) == "export.remote_code_refused"
    assert not (checkpoint / "ran").exists()


def test_own_code_is_named_before_an_unknown_architecture(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="openelm", auto_map={"AutoConfig": "configuration_openelm.OpenELMConfig"})
    assert code_of(checkpoint) == "export.remote_code_refused"


def test_quantised_checkpoint_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert code_of(checkpoint) == "export.quantised_already"
