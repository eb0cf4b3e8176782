"""One graph and one set of weights serve every task: with its adapter a task answers as a merged checkpoint would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edge_agent.contract.document import read_document
from edge_agent.contract.manifest import Manifest, read_manifest
from edge_agent.errors import EdgeError
from edge_agent.runtime.adapter import read_adapter, task_adapter
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.speed import PLAIN, Speed
from export.checkpoint.peft import ARCHITECTURES, open_adapter
from export.checkpoint.source import open_checkpoint
from export.graphs.fusions import fuse_projections
from export.graphs.graph import build_fp32, save_graph
from export.graphs.low_rank import add_branches, packed_matrices
from export.proof.greedy import GreedyDecoder, StepModel
from export.proof.parity import against_recording
from export.proof.recording import observe
from export.request import GraphOptions
from export.stages.adapt import merged
from export.stages.fuse import fp32_spec
from tests.export.adapters import MODULES, make_adapter
from tests.export.conftest import EVENTS, TASK, Build
from tests.export.test_parity import TESTED, make_checkpoint
from tests.fakes.bundles import BundleVariant

CONTEXT = 128
ADAPTED = [
    (like, changes) for like, changes in TESTED if like != "pythia-160m" and changes.get("model_type") != "starcoder2"
]


def test_every_architecture_that_takes_adapters_is_held_against_merged_weights() -> None:
    from export.checkpoint.synth import SHAPES

    assert {changes.get("model_type", SHAPES[like]["model_type"]) for like, changes in ADAPTED} == ARCHITECTURES


def prove(checkpoint: Path, adapter_folder: Path, scratch: Path) -> float:
    """Largest logit difference between graph with adapter and transformers with merged weights, over 65 positions."""
    opened = open_checkpoint(checkpoint)
    adapter = open_adapter(adapter_folder, opened)
    model = build_fp32(opened, CONTEXT)
    fuse_projections(model)
    branches = add_branches(model, {"task": adapter})
    save_graph(model, scratch / "fp32.onnx")
    names = tuple(branch.name for branch in branches)
    spec = replace(fp32_spec(opened, model, CONTEXT), adapter_inputs=names)
    with merged(opened, adapter, scratch) as whole:
        recording = observe(whole)
    with_adapter = StepModel(scratch / "fp32.onnx", spec, 1, packed_matrices(branches, adapter))
    parity = against_recording(recording, with_adapter)
    parity.require()
    # The other half of the promise: without its matrices it is another model, so the comparison can fail.
    assert not against_recording(recording, StepModel(scratch / "fp32.onnx", spec, 1)).holds
    return parity.max_abs_diff


@pytest.mark.parametrize(("like", "changes"), ADAPTED)
def test_graph_with_an_adapter_equals_transformers_with_merged_weights(
    like: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", like, changes)
    prove(checkpoint, make_adapter(tmp_path / "adapter", checkpoint), tmp_path)


@pytest.mark.parametrize(
    ("modules", "changes"),
    [
        (("q_proj", "v_proj"), {}),  # the middle of a packed product stays as it is
        (("k_proj",), {"r": 1}),
        (("up_proj",), {"r": 7, "lora_alpha": 3}),
        (MODULES, {"use_rslora": True, "r": 16, "lora_alpha": 4}),
    ],
    ids=["q+v", "k", "up", "rslora"],
)
def test_part_of_a_packed_projection_lands_in_its_own_columns(
    modules: tuple[str, ...], changes: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    prove(llama, make_adapter(tmp_path / "adapter", llama, modules=modules, **changes), tmp_path)


# --- bundles -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "int4"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(
    precision: str, make_bundle: Build, tasks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "plain"
    make_bundle(out, precision=precision, tasks=tasks)
    return out


@pytest.fixture(scope="module")
def adapted(
    precision: str,
    make_bundle: Build,
    tasks: tuple[Path, Path],
    adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "adapted"
    make_bundle(out, precision=precision, tasks=tasks, adapters={"expert": adapter})
    return out


@pytest.fixture(scope="module")
def merged_checkpoint(llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_checkpoint(llama)
    folder = tmp_path_factory.mktemp("merged")
    with merged(opened, open_adapter(adapter, opened), folder) as whole:
        return Path(shutil.copytree(whole.path, folder / "checkpoint"))


def engine_on(bundle: Path, speed: Speed = Speed()) -> Engine:  # noqa: B008 - frozen
    return Engine(open_installed_bundle(bundle, read_manifest(bundle)[1]), threads=1, speed=speed)


def answers(engine: Engine, task: str) -> list[Answer]:
    return [engine.decide(task, event, deadline_s=60) for event in EVENTS]


def said(found: list[Answer]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    return [(answer.decision, answer.confidence) for answer in found]


def about(found: list[Answer]) -> list[tuple[dict[str, Any], Any]]:
    """The same answers; confidences but for the last digits of guesses out of line."""
    return [(answer.decision, pytest.approx(answer.confidence, abs=1e-3)) for answer in found]


def test_a_task_without_adapter_answers_bit_for_bit_as_in_a_bundle_without_adapters(plain: Path, adapted: Path) -> None:
    # Without guesses: out of line they are scored with the last digits of other sums.
    assert said(answers(engine_on(adapted, PLAIN), "sort")) == said(answers(engine_on(plain, PLAIN), "sort"))


@pytest.fixture(scope="module")
def right(
    precision: str, adapted: Path, merged_checkpoint: Path, make_bundle: Build, tasks: tuple[Path, Path]
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """What the task with the adapter should say."""
    if precision == "int4":
        # Rounded weights plus an exact product are not the rounded sum: the plain decoder is the yardstick.
        oracle, task = oracle_of(adapted, "expert"), engine_on(adapted).tasks["expert"]
        decoded = [oracle.decide(task, event) for event in EVENTS]
        return [(one.decision, one.confidence()) for one in decoded]
    make_bundle(merged_checkpoint.parent / "bundle", checkpoint=merged_checkpoint, precision="fp32", tasks=tasks)
    return said(answers(engine_on(merged_checkpoint.parent / "bundle"), "expert"))


def test_a_task_with_adapter_answers_as_a_merged_checkpoint(
    precision: str, adapted: Path, plain: Path, right: list[tuple[dict[str, Any], dict[str, float]]]
) -> None:
    found = said(answers(engine_on(adapted), "expert"))
    assert [decision for decision, _ in found] == [decision for decision, _ in right]
    tolerance = 0.05 if precision == "int4" else 1e-3
    for (_, confidence), (_, wanted) in zip(found, right, strict=True):
        assert confidence == pytest.approx(wanted, abs=tolerance)
    # It is the adapter that makes the difference.
    assert found != said(answers(engine_on(plain), "expert"))


def oracle_of(bundle: Path, task: str) -> GreedyDecoder:
    model = read_manifest(bundle)[0].model
    return GreedyDecoder(
        bundle / model.decoder, bundle / model.tokenizer, model, adapter=task_adapter(bundle, model, task)
    )


def test_tasks_do_not_see_each_others_adapters(adapted: Path) -> None:
    engine = engine_on(adapted)
    alone = {task: about(answers(engine_on(adapted), task)) for task in ("sort", "expert")}
    for event, *expected in zip(EVENTS, *alone.values(), strict=True):
        mixed = [engine.decide(task, event, deadline_s=60) for task in alone]
        assert said(mixed) == expected


def test_the_bundle_says_what_it_holds(precision: str, adapted: Path, plain: Path) -> None:
    manifest, _ = read_manifest(adapted)
    assert manifest.model.adapters == {"expert": "tasks/expert/adapter.safetensors"}
    names = manifest.model.adapter_inputs or ()
    assert "lora.0.self_attn.q_proj+k_proj+v_proj" in names
    assert len(names) == 2 * 4
    report = json.loads((adapted / "report.json").read_text())
    assert report["adapters"]["expert"]["rank"] == 4
    assert "Adapter of expert" in (adapted / "report.html").read_text()
    before, after = ((bundle / manifest.model.decoder).stat().st_size for bundle in (plain, adapted))
    assert after - before < 20_000  # branches and no weights


def test_equal_input_gives_equal_bytes_with_adapters_too(
    adapted: Path, precision: str, make_bundle: Build, tasks: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    again = make_bundle(tmp_path / "again", precision=precision, tasks=tasks, adapters={"expert": adapter})
    assert again.digest == read_manifest(adapted)[1]


def test_a_device_that_does_not_know_adapters_refuses_the_graph(
    adapted: Path, tmp_path: Path, signing: Callable[[Path, Path], BundleVariant]
) -> None:
    bundle = signing(adapted, tmp_path / "old")

    def forget(manifest: dict[str, Any]) -> None:
        # What a manifest says to a device that ignores what it does not know.
        del manifest["model"]["adapters"], manifest["model"]["adapter_inputs"]

    bundle.seal(forget)
    with pytest.raises(EdgeError) as caught:
        Engine(bundle.open(), 1)
    assert caught.value.code == "bundle.unsupported"


def test_an_adapter_of_another_shape_is_refused_at_load(
    adapted: Path, tmp_path: Path, signing: Callable[[Path, Path], BundleVariant]
) -> None:
    bundle = signing(adapted, tmp_path / "odd")
    file = bundle.path / "tasks/expert/adapter.safetensors"
    arrays = {name: torch.from_numpy(matrix) for name, matrix in read_adapter(file).items()}
    name = next(name for name in arrays if name.endswith(".A"))
    arrays[name] = arrays[name][:-1].contiguous()
    save_file(arrays, file)
    bundle.seal()
    with pytest.raises(EdgeError) as caught:
        Engine(bundle.open(), 1)
    assert caught.value.code == "adapter.invalid"


@pytest.fixture
def signing() -> Callable[[Path, Path], BundleVariant]:
    from edge_agent.contract.dsse import generate_key

    return lambda source, path: BundleVariant(source, path, generate_key())


def test_an_adapter_of_a_task_that_is_not_in_the_bundle_is_refused() -> None:
    model = {
        "decoder": "d",
        "tokenizer": "t",
        "architecture": "a",
        "precision": "p",
        "vocab_size": 2,
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 1,
        "max_context_tokens": 16,
        "eos_token_id": 0,
        "adapter_inputs": ["lora.0"],
        "adapters": {"nobody": "d"},
    }
    files = [{"path": path, "size": 0, "sha256": "0" * 64} for path in ("d", "t", "tasks/sort/task.yaml")]
    with pytest.raises(ValueError, match="nobody"):
        read_document(
            Manifest,
            {
                "name": "a",
                "version": "1",
                "target": "cpu-x86_64",
                "model": model,
                "tasks": ["sort"],
                "files": files,
                "resources": {"disk_bytes": 0, "ram_bytes": 0},
            },
        )


def test_a_router_hands_its_events_to_an_adapter(
    make_bundle: Build, tasks: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "router").mkdir()
    everything = "handoff: [{when: {urgent: [true, false]}, to: expert}]\n"
    (tmp_path / "router" / "task.yaml").write_text((tasks[0] / "task.yaml").read_text() + everything)
    make_bundle(tmp_path / "bundle", tasks=(tmp_path / "router", tasks[1]), adapters={"expert": adapter})
    engine = engine_on(tmp_path / "bundle")
    routed = answers(engine, "sort")
    assert {answer.specialist for answer in routed} == {"expert"}
    assert said(routed) == about(answers(engine, "expert"))


def test_a_router_without_its_specialist_is_refused_before_anything_is_built(
    make_bundle: Build, tmp_path: Path
) -> None:
    (tmp_path / "router").mkdir()
    lonely = "handoff: [{when: {urgent: [true]}, to: expert}]\n"
    (tmp_path / "router" / "task.yaml").write_text(TASK + lonely)
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", tasks=(tmp_path / "router",))
    assert caught.value.code == "task.routing_invalid"
    assert [path.name for path in tmp_path.iterdir()] == ["router"]


OTHER_OPTIONS = [GraphOptions(head="split", together=True), GraphOptions(together=False)]


@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=["split", "one at a time"])
def test_adapters_go_with_other_graph_options(
    options: GraphOptions, make_bundle: Build, tasks: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    for name, graph in {"one": GraphOptions(), "other": options}.items():
        make_bundle(tmp_path / name, precision="fp32", tasks=tasks, adapters={"expert": adapter}, graph=graph)
    one, other = (answers(engine_on(tmp_path / name), "expert") for name in ("one", "other"))
    assert [answer.decision for answer in one] == [answer.decision for answer in other]
