"""A pickle is data when the user vouches for it, refused when not, and a program never."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint.source import open_checkpoint
from export.graphs.graph import build_fp32, save_graph
from export.proof.greedy import StepModel
from export.proof.parity import against_transformers
from export.stages.fuse import fp32_spec
from tests.export.test_source_refusals import code_of


def pickled(checkpoint: Path, **more: torch.Tensor) -> Path:
    """The weights as the pickle that older checkpoints come with."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save({**weights, **more}, checkpoint / "pytorch_model.bin")
    return checkpoint / "pytorch_model.bin"


def test_trusted_pickle_has_the_same_weights_as_safetensors(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    pickled(checkpoint)
    opened = open_checkpoint(checkpoint, trust=True, scratch=tmp_path / "scratch")
    plain = open_checkpoint(llama)
    assert opened.path == tmp_path / "scratch" / "checkpoint"
    assert (opened.parameters, opened.bos_token_id) == (plain.parameters, plain.bos_token_id)
    left, right = load_file(opened.weight_files[0]), load_file(plain.weight_files[0])
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    # What is vouched for is what was given, not what was made of it.
    assert set(opened.file_hashes) == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_trusted_pickle_makes_the_same_bytes_twice(checkpoint: Path, tmp_path: Path) -> None:
    pickled(checkpoint)
    one, two = (open_checkpoint(checkpoint, trust=True, scratch=tmp_path / name) for name in ("one", "two"))
    assert one.weight_files[0].read_bytes() == two.weight_files[0].read_bytes()


def test_trusted_pickle_becomes_a_graph_that_is_the_model(checkpoint: Path, tmp_path: Path) -> None:
    pickled(checkpoint)
    opened = open_checkpoint(checkpoint, trust=True, scratch=tmp_path / "scratch")
    model = build_fp32(opened, 128)
    save_graph(model, tmp_path / "fp32.onnx")
    step = StepModel(tmp_path / "fp32.onnx", fp32_spec(opened, model, 128))
    assert against_transformers(opened, step).holds


def test_trusted_shards_of_pickles_are_read(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, checkpoint / file)
        weight_map.update(dict.fromkeys(part, file))
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert code_of(checkpoint) == "export.pickle_refused"
    opened = open_checkpoint(checkpoint, trust=True, scratch=tmp_path / "scratch")
    assert opened.parameters == open_checkpoint(llama).parameters
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.shard_missing"


def test_tied_head_of_a_pickle_is_stored_once(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, checkpoint / "pytorch_model.bin")
    opened = open_checkpoint(checkpoint, trust=True, scratch=tmp_path / "scratch")
    assert opened.parameters == open_checkpoint(llama).parameters


class Hostile:
    """Would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_runs_nothing_even_when_trusted(checkpoint: Path, tmp_path: Path, zipped: bool) -> None:  # noqa: FBT001
    (checkpoint / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    hostile = {"model.norm.weight": torch.ones(3), "other": Hostile(ran)}
    torch.save(hostile, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    # The file does what it says when it is opened carelessly: otherwise this test would show nothing.
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert ran.exists()
    ran.unlink()
    assert code_of(checkpoint) == "export.pickle_refused"
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.pickle_invalid"
    assert not ran.exists()


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_truncated_pickle_is_refused(checkpoint: Path, tmp_path: Path, kept: int) -> None:
    file = pickled(checkpoint)
    file.write_bytes(file.read_bytes()[:kept])
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.pickle_invalid"


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"w": torch.ones(2)}}, {"epoch": 3}])
def test_pickle_of_anything_but_weights_is_refused(checkpoint: Path, tmp_path: Path, content: Any) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(content, checkpoint / "pytorch_model.bin")
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.pickle_invalid"


def test_nan_in_a_trusted_pickle_is_found(checkpoint: Path, tmp_path: Path) -> None:
    pickled(checkpoint, **{"model.norm.weight": torch.full((128,), float("nan"))})
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.nan_weights"


def test_trust_does_not_make_other_pickles_welcome(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps({}))
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.pickle_refused"


def test_safetensors_are_preferred_and_a_pickle_beside_them_stays_closed(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    opened = open_checkpoint(checkpoint, trust=True, scratch=tmp_path / "scratch")
    assert opened.path == checkpoint
    assert "pytorch_model.bin" not in opened.file_hashes


def test_large_pickle_is_refused_by_its_size_alone(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with (checkpoint / "pytorch_model.bin").open("wb") as writer:
        writer.truncate(5_000_000_000)  # sparse
    assert code_of(checkpoint, trust=True, scratch=tmp_path / "scratch") == "export.too_large"
