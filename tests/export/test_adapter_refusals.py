"""Adapters that change more than low-rank products, or that are damaged, are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_agent.errors import EdgeError
from export.checkpoint.peft import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from export.checkpoint.source import open_checkpoint
from export.graphs.fusions import fuse_projections
from export.graphs.graph import build_fp32
from export.graphs.low_rank import add_branches, packed_matrices
from export.request import GraphOptions, Identity, Shrinking
from tests.export.adapters import make_adapter
from tests.export.conftest import Build
from tests.export.test_parity import make_checkpoint

CONTEXT = 128


def code_of(folder: Path, checkpoint: Path) -> str:
    with pytest.raises(EdgeError) as caught:
        open_adapter(folder, open_checkpoint(checkpoint))
    return caught.value.code


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_qalora": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"something_of_next_year": {"on": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_setting_that_changes_more_than_a_low_rank_product_is_refused(
    changes: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    assert code_of(make_adapter(tmp_path / "adapter", llama, **changes), llama) == "adapter.unsupported"


def test_an_adapter_of_an_architecture_with_other_names_is_refused(tmp_path: Path, adapter: Path) -> None:
    pythia = make_checkpoint(tmp_path / "pythia", "pythia-160m", {"num_attention_heads": 2, "head_dim": 64})
    assert code_of(adapter, pythia) == "adapter.unsupported"


def test_an_adapter_of_a_wider_base_is_refused(tmp_path: Path, adapter: Path) -> None:
    wide = make_checkpoint(tmp_path / "wide", "smollm2-135m", {"intermediate_size": 256})
    assert code_of(adapter, wide) == "adapter.invalid"


Tensors = dict[str, torch.Tensor]


def first(tensors: Tensors, side: str) -> str:
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def lose_one(tensors: Tensors) -> None:
    del tensors[first(tensors, "B")]


def lose_a_module(tensors: Tensors) -> None:
    for name in [name for name in tensors if "k_proj" in name]:
        del tensors[name]


def lose_all(tensors: Tensors) -> None:
    tensors.clear()


def poison(tensors: Tensors) -> None:
    tensors[first(tensors, "A")][0, 0] = torch.nan


def another_rank(tensors: Tensors) -> None:
    name = first(tensors, "A")
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize("damage", [lose_one, lose_a_module, lose_all, poison, another_rank])
def test_a_damaged_adapter_is_refused(
    damage: Callable[[Tensors], None], llama: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS_NAME)
    damage(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)
    assert code_of(folder, llama) == "adapter.invalid"


@pytest.mark.parametrize("name", ["base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.weight"])
def test_an_adapter_that_changes_more_than_projections_is_refused(
    name: str, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    save_file({**load_file(folder / WEIGHTS_NAME), name: torch.zeros(4, 128)}, folder / WEIGHTS_NAME)
    assert code_of(folder, llama) == "adapter.unsupported"


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_folder_without_one_of_the_files_is_refused(name: str, llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / name).unlink()
    assert code_of(folder, llama) == "adapter.invalid"


def test_a_truncated_file_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-1000])
    assert code_of(folder, llama) == "adapter.invalid"


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": Identity("tiny", "1", "qnn-htp"), "precision": "a16w8"},
        {"identity": Identity("tiny", "1", "openvino"), "precision": "fp32"},
        {"identity": Identity("tiny", "1", "cuda-jetson")},
        {"graph": GraphOptions(kv="int8")},
        {"sweep_s": 5.0},
        {"shrinking": Shrinking(Path("events.jsonl"), drop_layers=1)},
    ],
    ids=["qnn-htp", "openvino", "cuda-jetson", "int8 caches", "sweep", "shrinking"],
)
def test_an_option_that_looks_at_the_shared_weights_alone_is_refused(
    changes: dict[str, Any], make_bundle: Build, tasks: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", tasks=tasks, adapters={"expert": adapter}, **changes)
    assert caught.value.code == "export.option_unsuitable"


def test_an_adapter_for_a_task_that_is_not_built_is_refused(make_bundle: Build, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", adapters={"nobody": adapter})
    assert caught.value.code == "export.task_unknown"


def test_matrices_of_nothing_are_left_out(llama: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(llama)
    both = {
        "wide": open_adapter(make_adapter(tmp_path / "wide", llama), opened),
        "narrow": open_adapter(make_adapter(tmp_path / "narrow", llama, modules=("o_proj",)), opened),
    }
    branches = add_branches(build_fused(llama), both)
    assert {name.split(".")[3] for name in packed_matrices(branches, both["narrow"])} == {"o_proj"}
    packed = packed_matrices(branches, both["wide"])["lora.0.self_attn.q_proj+k_proj+v_proj.B"]
    assert packed.shape == (12, 256)
    assert np.count_nonzero(packed[:4, 128:]) == 0  # query's rows add nothing to key and value


def build_fused(checkpoint: Path) -> Any:
    model = build_fp32(open_checkpoint(checkpoint), CONTEXT)
    fuse_projections(model)
    return model
