"""A tiny checkpoint of each architecture, built once a session: random weights, real shapes, real tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_agent.contract.dsse import generate_key
from edge_agent.contract.task import load_task
from export.build import BuildResult, Workplace, build
from export.checkpoint.synth import synthesise
from export.progress import QuietProgress
from export.proof.greedy import GreedyDecoder
from export.quantisation.quantize import QuantSettings
from export.request import BuildRequest, Identity, Measurement
from tests.export.adapters import make_adapter

TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    # Wide enough that logits differ clearly; with the usual 0.02 every token is as likely as any other.
    "initializer_range": 0.2,
    # The value that the graph builder misreads as "no positions".
    "rope_theta": 10_000.0,
}

TASK = """\
name: sort
version: 1
prompt:
  prefix: "Sort the event.\\n"
  event:
    - {field: machine, label: machine}
    - {field: text, label: text, max_chars: 120}
output:
  type: object
  properties:
    kind: {type: string, enum: [stop, stop_all, slow, unknown]}
    urgent: {type: boolean}
    rank: {type: integer, minimum: 1, maximum: 12}
thresholds: {kind: 0.5}
limits: {max_prompt_tokens: 128}
"""
EVENTS: tuple[dict[str, Any], ...] = (
    {"machine": "press-4", "text": "hydraulic pressure below setpoint for 12 s"},
    {"machine": "oven-1", "text": "Temperatur zu hoch"},
    {"machine": "robot-7"},
    {"text": "guard door open, emergency stop pressed, coolant level low"},
)

Build = Callable[..., BuildResult]


QUIET = Workplace(QuietProgress())


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    synthesise("smollm2-135m", folder, layers=2, **TINY)
    return folder


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def task_folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task whose golden examples are the tiny model's own answers: with random weights, right is what it says."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("task")
    (plain / "task.yaml").write_text(TASK)
    (folder / "task.yaml").write_text(TASK)
    request = BuildRequest(llama, (plain,), Identity("tiny", "1.0.0", "cpu-x86_64"))
    bundle = plain / "bundle"
    result = build(request, bundle, generate_key(), QUIET)
    model = result.manifest.model
    oracle = GreedyDecoder(bundle / model.decoder, bundle / model.tokenizer, model)
    task = load_task(folder / "task.yaml")
    rows = [{"event": event, "decision": oracle.decide(task, event).decision} for event in EVENTS]
    (folder / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def make_bundle(llama: Path, task_folder: Path) -> Build:
    """Builds a bundle of the tiny checkpoint; keyword arguments change the request."""

    def make(
        out: Path, *, checkpoint: Path = llama, force: bool = False, work: Path | None = None, **changes: Any
    ) -> BuildResult:
        fields: dict[str, Any] = {
            "tasks": (task_folder,),
            "identity": Identity("tiny", "1.0.0", "cpu-x86_64"),
            "quantisation": QuantSettings("k_quant", 32),
            "measurement": Measurement(),
            **changes,
        }
        return build(
            BuildRequest(checkpoint=checkpoint, **fields), out, generate_key(), replace(QUIET, force=force, work=work)
        )

    return make


@pytest.fixture(scope="session")
def int4_bundle(make_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "int4"
    make_bundle(out)
    return out


@pytest.fixture(scope="session")
def fp32_bundle(make_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    # Without golden examples: those of `task_folder` are answers of the INT4 model.
    (folder / "task.yaml").write_text(TASK)
    make_bundle(folder / "fp32", precision="fp32", tasks=(folder,))
    return folder / "fp32"


def change_config(checkpoint: Path, **entries: Any) -> None:
    """Edit ``config.json``."""
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit ``model.safetensors``."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "expert", llama)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tasks that differ in nothing but their names."""
    folders = []
    for name in ("sort", "expert"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "task.yaml").write_text(TASK.replace("name: sort", f"name: {name}"))
        folders.append(folder)
    return folders[0], folders[1]
