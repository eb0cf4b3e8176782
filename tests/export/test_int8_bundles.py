"""Bundles in eight bits by rows: what they say of themselves, and which builds are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import EdgeError
from export.boards import buildable_board
from export.checkpoint.source import open_checkpoint
from export.plan import plan
from export.quantisation.int8_rows import LABEL
from export.request import BuildRequest, GraphOptions, Identity, Measurement
from export.tasks import open_tasks
from tests.export.conftest import TASK, Build
from tests.export.test_build_options import report_of


def plain_task(folder: Path) -> tuple[Path]:
    """Without golden examples: those of `task_folder` are answers of another rounding."""
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK)
    return (folder,)


def test_bundle_says_its_precision_and_is_proven(make_bundle: Build, task_folder: Path, tmp_path: Path) -> None:
    events = task_folder / "golden.jsonl"
    graph = GraphOptions(vocabulary=(events,), vocab_rows=400, kv="int8", head="split", together=True)
    options: dict[str, Any] = {
        "precision": "int8",
        "graph": graph,
        "tasks": plain_task(tmp_path / "task"),
        "measurement": Measurement(calibrate_on={"sort": events}, evaluate_on={"sort": events}),
    }
    result = make_bundle(tmp_path / "one", **options)
    assert result.manifest.model.precision == LABEL == "int8-row"
    assert result.manifest.model.graph_interface == 1
    found = report_of(tmp_path / "one")["parity"]["int8_against_fp32"]
    assert found["positions"] > 0
    assert found["mean_kl_nats"] < 1.5, "a wrong scale or a transposed weight gives more than 5"
    assert set(result.manifest.quality["sort"]) == {"fp32", "int8"}
    assert make_bundle(tmp_path / "two", **options).digest == result.digest, "equal input gives equal bytes"


def test_plan_foretells_the_size(llama: Path, make_bundle: Build, tmp_path: Path) -> None:
    tasks = plain_task(tmp_path / "task")
    identity = Identity("tiny", "1", "cpu-x86_64")
    board = buildable_board("cpu-x86_64")
    request = BuildRequest(llama, tasks, identity, precision="int8")
    estimate = plan(request, open_checkpoint(llama), board, open_tasks(tasks, 256), 10**12)
    make_bundle(tmp_path / "bundle", work=tmp_path / "work", precision="int8", tasks=tasks)
    step = next(step for step in estimate.steps if step.stage == "quantise")
    found = sum(path.stat().st_size for path in (tmp_path / "work/quantise/model").iterdir())
    assert step.does == LABEL
    assert 0.75 < step.writes_bytes / found < 1.1


@pytest.mark.parametrize("target", ["qnn-htp", "openvino", "cuda-jetson"])
def test_target_of_another_kind_refuses_it(target: Any, make_bundle: Build, tmp_path: Path) -> None:
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", precision="int8", identity=Identity("tiny", "1.0.0", target))
    assert caught.value.code == "export.precision_unsupported"
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("changes", [{"int8_share": 0.1}, {"sweep_s": 5.0}])
def test_options_of_int4_are_refused(changes: dict[str, Any], make_bundle: Build, tmp_path: Path) -> None:
    with pytest.raises(EdgeError) as caught:
        make_bundle(tmp_path / "bundle", precision="int8", **changes)
    assert caught.value.code == "export.option_unsuitable"
