"""Every option of a build ends in a bundle that the device's engine answers rightly, and says what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.manifest import Manifest, read_manifest
from edge_agent.errors import EdgeError
from export.__main__ import main
from export.boards import load_boards
from export.build import BuildResult
from export.chain import data_hashes
from export.checkpoint.source import open_checkpoint
from export.quantisation.quantize import QuantSettings
from export.request import GraphOptions, Identity, Measurement, Shrinking
from export.stages.fixed_shapes import shape_for
from tests.export.conftest import TASK, Build, change_config


@pytest.fixture
def plain_task(tmp_path: Path) -> tuple[Path]:
    """Without golden examples: those of `task_folder` are answers of another rounding."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK)
    return (folder,)


@pytest.fixture
def events(task_folder: Path) -> Path:
    return task_folder / "golden.jsonl"


def report_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "report.json").read_text())
    return found


def test_pruned_head_is_in_the_bundle_and_on_the_card(make_bundle: Build, events: Path, tmp_path: Path) -> None:
    graph = GraphOptions(vocabulary=(events,), vocab_rows=400, vocab_heldout=(events,))
    manifest = make_bundle(tmp_path / "bundle", graph=graph).manifest
    assert manifest.model.head_ids == "model/head_ids.bin"
    assert manifest.model.head_ids in {entry.path for entry in manifest.files}
    facts = report_of(tmp_path / "bundle")["vocabulary"]
    assert facts["rows"] == (tmp_path / "bundle/model/head_ids.bin").stat().st_size // 4
    assert 0 < facts["heldout"]["reachable_share"] <= 1
    agreement = report_of(tmp_path / "bundle")["parity"]["int4_against_fp32"]
    assert 0 < agreement["mean_kl_nats"] < 10, "what the head cannot choose must not count as infinitely far"


def test_coarse_rows_make_the_file_smaller(make_bundle: Build, events: Path, plain_task: Any, tmp_path: Path) -> None:
    sizes = {}
    for rare in ("int4", "int2"):
        graph = GraphOptions(vocabulary=(events,), vocab_rows=300, rare_rows=rare)
        make_bundle(tmp_path / rare, graph=graph, tasks=plain_task)
        sizes[rare] = report_of(tmp_path / rare)["size_bytes"]["embedding and head"]
    assert sizes["int2"] < 0.85 * sizes["int4"]


def test_int8_caches_without_a_text_to_measure_them_on_are_refused(
    make_bundle: Build, plain_task: Any, tmp_path: Path
) -> None:
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", graph=GraphOptions(kv="int8"), tasks=plain_task)
    assert caught.value.code == "export.calibration_missing"
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("graph", "field", "value"),
    [
        (GraphOptions(kv="int8"), "kv_dtype", "int8"),
        (GraphOptions(head="split"), "head", "model/head.onnx"),
        (GraphOptions(), "score_at", True),
        (GraphOptions(together=False), "ragged", None),
    ],
)
def test_graph_option_is_in_the_manifest(
    graph: GraphOptions, field: str, value: object, make_bundle: Build, tmp_path: Path
) -> None:
    model = make_bundle(tmp_path / "bundle", graph=graph).manifest.model
    assert getattr(model, field) == value


def test_share_of_the_weights_keeps_eight_bits(make_bundle: Build, plain_task: Any, tmp_path: Path) -> None:
    result = make_bundle(tmp_path / "bundle", int8_share=0.5, tasks=plain_task)
    layers = report_of(tmp_path / "bundle")["sensitivity"]
    assert 0 < sum(layer["int8"] for layer in layers) < len(layers)
    assert "+int8x" in result.manifest.model.precision


def test_sweep_takes_a_knee_and_shows_the_front(make_bundle: Build, plain_task: Any, tmp_path: Path) -> None:
    result = make_bundle(tmp_path / "bundle", sweep_s=0.001, tasks=plain_task)
    rows = report_of(tmp_path / "bundle")["sweep"]
    knee = next(row for row in rows if row.get("knee"))
    assert result.manifest.model.precision == knee["label"]
    assert [row for row in rows if row["bytes"] is None], "what there was no time for is listed"
    assert not any(key.endswith("tok_per_s") for row in rows for key in row), "speeds differ from run to run"


def test_calibrated_method_uses_labelled_events(
    make_bundle: Build, plain_task: Any, events: Path, tmp_path: Path
) -> None:
    measurement = Measurement(calibrate_on={"sort": events})
    made = [
        make_bundle(tmp_path / name, quantisation=QuantSettings("gptq"), tasks=plain_task, measurement=measurement)
        for name in ("one", "two")
    ]
    assert made[0].digest == made[1].digest
    assert made[0].manifest.model.precision == "int4-gptq-32"


def test_calibrated_method_without_events_is_refused(make_bundle: Build, plain_task: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", quantisation=QuantSettings("gptq"), tasks=plain_task)
    assert caught.value.code == "export.calibration_missing"


def test_dropped_layer_is_told_in_manifest_and_report(
    make_bundle: Build, plain_task: Any, events: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    shrinking = Shrinking(tmp_path / "data.jsonl", drop_layers=1, minutes=None, steps=1)
    manifest = make_bundle(tmp_path / "bundle", shrinking=shrinking, tasks=plain_task).manifest
    assert manifest.model.num_layers == 1
    (step,) = manifest.provenance["lineage"]
    assert len(step["dropped"]) == 1
    assert report_of(tmp_path / "bundle")["lineage"] == manifest.provenance["lineage"]


def test_events_count_by_content_not_by_name(events: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(events.read_bytes())
    assert data_hashes(Measurement({"sort": events})) == data_hashes(Measurement({"sort": copy}))
    copy.write_text("{}\n")
    assert data_hashes(Measurement({"sort": events})) != data_hashes(Measurement({"sort": copy}))


def test_static_window_reaches_no_further_than_the_model(checkpoint: Path) -> None:
    board = load_boards()["qnn-htp"]
    assert shape_for(board, open_checkpoint(checkpoint)).past_tokens == 256
    change_config(checkpoint, sliding_window=16)
    shape = shape_for(board, open_checkpoint(checkpoint))
    assert shape.past_tokens == 16
    assert shape.windows == (1,)


def test_schema_that_cannot_be_compiled_is_refused_before_the_work(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    recursive = TASK.replace("urgent: {type: boolean}", 'urgent: {$ref: "#/properties/kind"}')
    (folder / "task.yaml").write_text(recursive)
    arguments = ["build", str(llama), "--target", "cpu-x86_64", "--task", str(folder), "--out", str(tmp_path / "o")]
    assert main(arguments) == 1
    assert not list(tmp_path.glob(".o.work"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--int8-share", "7"], "export.usage"),
        (["--int8-share", "nan"], "export.usage"),
        (["--sweep", "-5"], "export.usage"),
        (["--sweep", "60", "--precision", "fp32"], "export.option_unsuitable"),
        (["--vocab-from", "not-there.txt"], "export.data_unreadable"),
        (["--target", "openvino", "--kv", "int8"], "export.option_unsuitable"),
    ],
)
def test_option_that_cannot_be_is_refused_before_the_work(
    options: list[str],
    code: str,
    llama: Path,
    task_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["build", str(llama), "--target", "cpu-x86_64", "--task", str(task_folder), "--dry-run"]
    assert main([*arguments, "--out", str(tmp_path / "o"), *options]) in (1, 2)
    assert code in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--drop-layers", "1"],
        ["--distil-into", "half-width"],
        ["--drop-layers", "1", "--distil-into", "half-width", "--train-on", "x.jsonl"],
    ],
)
def test_shrinking_without_all_it_needs_is_wrong_usage(options: list[str], llama: Path, task_folder: Path) -> None:
    arguments = ["build", str(llama), "--target", "cpu-x86_64", "--task", str(task_folder), "--out", "o", *options]
    assert main(arguments) == 2


@pytest.mark.needs("module:onnxruntime_qnn")
@pytest.mark.slow
def test_build_for_a_qualcomm_chip_without_golden_examples_is_compiled_and_no_more(
    make_bundle: Build, plain_task: Any, events: Path, tmp_path: Path
) -> None:
    # Random weights hardly prefer one answer to another: which one, fixed point may turn. What is right on the emulator
    # is shown with the reference model (tests/npu/test_qnn.py).
    result: BuildResult = make_bundle(
        tmp_path / "bundle",
        identity=Identity("tiny", "1", "qnn-htp"),
        precision="a16w8",
        soc="QCS8550",
        tasks=plain_task,
        measurement=Measurement(calibrate_on={"sort": events}),
    )
    assert result.report["verification"] == "compiled"
    assert {record["word"] for record in result.report["evidence"]} == {"compiled", "unverified"}
    manifest: Manifest = read_manifest(tmp_path / "bundle")[0]
    assert manifest.model.graph_interface == 2


def test_build_for_openvino_without_openvino_is_unverified(make_bundle: Build, plain_task: Any, tmp_path: Path) -> None:
    identity = Identity("tiny", "1", "openvino")
    result = make_bundle(tmp_path / "bundle", identity=identity, precision="fp32", tasks=plain_task)
    assert result.report["verification"] == "unverified"
    assert result.manifest.minimum_runtime["onnxruntime"] < "1.32.0"
