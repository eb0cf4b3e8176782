"""The reference model as static graphs, made once a session, and bundles of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.contract.manifest import Target, read_manifest
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.assembly import Parts, assemble
from export.boards import load_boards
from export.checkpoint.source import Checkpoint, open_checkpoint
from export.graphs.graph import build_fp32, save_graph
from export.npu.portable import export_portable
from export.npu.qdq import FixedPoint
from export.npu.static_graph import StaticShape, build_windows
from export.npu.windows import StaticModel, quantise_windows
from export.request import Identity
from export.stages.fuse import fp32_spec
from export.stages.layout import DECODER, link_or_copy, write_spec
from export.tasks import TaskFolder, open_tasks
from export.texts import TaskTexts

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = REPOSITORY / "export/reference"
HELD_OUT = REFERENCE / "data/heldout.jsonl"
PAST_TOKENS = 352
"""Enough for the reference task: prefix, an event of 256 tokens, answer."""

MakeBundle = Callable[[StaticModel, Target, Path], Path]
Fixed = Callable[[FixedPoint], StaticModel]


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint(REFERENCE / "checkpoint")


@pytest.fixture(scope="session")
def tasks() -> tuple[TaskFolder, ...]:
    return tuple(open_tasks([REFERENCE / "task"], PAST_TOKENS))


@pytest.fixture(scope="session")
def static(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> StaticModel:
    """The reference model in static fp32 graphs of 32 tokens and of one."""
    folder = tmp_path_factory.mktemp("static")
    portable = export_portable(checkpoint, tmp_path_factory.mktemp("portable"))
    return StaticModel(folder, build_windows(checkpoint, portable, StaticShape(PAST_TOKENS, (32, 1)), folder))


@pytest.fixture(scope="session")
def fixed(
    static: StaticModel,
    checkpoint: Checkpoint,
    tasks: tuple[TaskFolder, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Fixed:
    """The same in fixed point, calibrated on the golden examples."""
    made: dict[FixedPoint, StaticModel] = {}
    texts = TaskTexts(checkpoint, tasks).calibration(24)

    def make(how: FixedPoint) -> StaticModel:
        if how not in made:
            made[how] = quantise_windows(static, texts, how, tmp_path_factory.mktemp(how.precision))
        return made[how]

    return make


@pytest.fixture(scope="session")
def make_bundle(checkpoint: Checkpoint, tasks: tuple[TaskFolder, ...]) -> MakeBundle:
    """Lays a model out as a bundle, unsigned."""

    def make(model: StaticModel, target: Target, folder: Path) -> Path:
        write_spec(model.folder, model.spec)
        oldest = load_boards()[target].minimum_onnxruntime
        identity = Identity("triage", "1.0.0", target)
        parts = Parts(identity, checkpoint, tasks, model.folder, texts={}, quality={}, minimum_onnxruntime=oldest)
        assemble(parts, folder, link_or_copy)
        return folder

    return make


@pytest.fixture(scope="session")
def fused(checkpoint: Checkpoint, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine on the fused fp32 graph: what every other graph is held against."""
    folder = tmp_path_factory.mktemp("fused")
    model = build_fp32(checkpoint, checkpoint.max_positions)
    save_graph(model, folder / DECODER)
    spec = fp32_spec(checkpoint, model, checkpoint.max_positions)
    return engine_of(make_bundle(StaticModel(folder, spec), "cpu-x86_64", tmp_path_factory.mktemp("fused-bundle")))


def engine_of(bundle: Path) -> Engine:
    return Engine(open_installed_bundle(bundle, read_manifest(bundle)[1]), threads=1)
