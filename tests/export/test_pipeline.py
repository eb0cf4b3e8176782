"""Stages on disk: whole or absent, never made twice for the same inputs, never built upon when damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.errors import EdgeError
from export.boards import buildable_board
from export.checkpoint.source import open_checkpoint
from export.pipeline import Pipeline
from export.plan import Step, int4_bytes, plan, plan_lines, require_work_space, weigh
from export.progress import LineProgress, QuietProgress
from export.quantisation.quantize import QuantSettings
from export.request import BuildRequest, Identity
from export.tasks import open_tasks
from tests.export.conftest import Build

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """Two stages, the second reading the first, and a count of how often each was really made."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.made: list[str] = []

    def __call__(self, first: int = 1, second: int = 1, versions: str = "1") -> str:
        self.made.clear()
        pipeline = Pipeline(self.work, QuietProgress(), {"tool": versions})
        with pipeline.opened():
            one = pipeline.stage("one", {"value": first}, lambda folder: self._make("one", folder, str(first)))
            text = (one / "out").read_text
            two = pipeline.stage(
                "two", {"value": second}, lambda folder: self._make("two", folder, text() + str(second)), after=("one",)
            )
        return (two / "out").read_text()

    def _make(self, stage: str, folder: Path, content: str) -> None:
        self.made.append(stage)
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text(content * 1000)
        (folder / "out").write_text(content)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "work")


def test_second_run_makes_nothing(run: Run) -> None:
    assert run() == "11"
    assert run.made == ["one", "two"]
    assert run() == "11"
    assert run.made == []


def test_changed_input_remakes_the_stage_and_what_follows_it_only(run: Run) -> None:
    run()
    assert run(second=2) == "12"
    assert run.made == ["two"]
    assert run(first=3, second=2) == "32"
    assert run.made == ["one", "two"]


def test_other_library_version_remakes_everything(run: Run) -> None:
    run()
    run(versions="2")
    assert run.made == ["one", "two"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda stage: (stage / "deep/weights").write_text("x"),
        lambda stage: (stage / "deep/weights").unlink(),
        lambda stage: (stage / "stage.json").write_text("{"),
        lambda stage: (stage / "stage.json").write_text("[]"),
        lambda stage: (stage / "stage.json").write_text('{"key": "other", "files": {}}'),
        lambda stage: (stage / "stage.json").unlink(),
    ],
    ids=["content", "missing", "cut stamp", "odd stamp", "other key", "no stamp"],
)
def test_damaged_output_is_made_anew(damage: Callable[[Path], object], run: Run) -> None:
    run()
    damage(run.work / "one")
    assert run() == "11"
    # The remade stage has the same key, so what was built from the undamaged one still holds.
    assert run.made == ["one"]


def test_failed_stage_leaves_nothing_and_keeps_the_earlier_ones(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    pipeline = Pipeline(tmp_path / "work", QuietProgress(), {})
    with pipeline.opened():
        pipeline.stage("one", {}, lambda folder: None)
        with pytest.raises(EdgeError) as caught:
            pipeline.stage("two", {}, fails)
    assert caught.value.code == "disk.full"
    assert "stage two" in caught.value.detail
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["lock", "one"]


def test_kill_in_the_middle_of_a_stage_leaves_no_stage(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from export.pipeline import Pipeline; from export.progress import QuietProgress\n"
        "def slow(folder):\n"
        "    (folder / 'out').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
        "pipeline = Pipeline(Path(sys.argv[1]), QuietProgress(), {})\n"
        "with pipeline.opened():\n"
        "    pipeline.stage('one', {}, slow)\n"
    )
    work = tmp_path / "work"
    child = subprocess.Popen([sys.executable, "-c", script, str(work)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    with pytest.raises(EdgeError) as caught, Pipeline(work, QuietProgress(), {}).opened():
        pass
    assert caught.value.code == "export.work_busy"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (work / "one").exists()
    pipeline = Pipeline(work, QuietProgress(), {})
    with pipeline.opened():
        assert not list(work.glob(".*.partial")), "what was half made is swept away"
        pipeline.stage("one", {}, lambda folder: None)
    assert not pipeline.timings[0].reused


def test_build_goes_on_where_it_was_killed(llama: Path, task_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", "build", str(llama), "--target", "cpu-x86_64", "--name", "tiny"]
    command += ["--task", str(task_folder), "--out", str(out)]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("[quantise]"):
            break
    first.kill()
    first.communicate()
    assert not out.exists()
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "[fuse] as it was" in second.stderr
    assert "[quantise] as it was" in second.stderr
    assert (out / "manifest.sig.json").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "the work folder is gone"


def test_resumed_bundle_equals_an_uninterrupted_one(make_bundle: Build, tmp_path: Path) -> None:
    whole = make_bundle(tmp_path / "whole")
    work = tmp_path / "work"
    make_bundle(tmp_path / "first", work=work)
    (work / "specialise" / "spec.json").write_text("{}")
    again = make_bundle(tmp_path / "second", work=work)
    assert again.digest == whole.digest
    assert {timing.stage: timing.reused for timing in again.timings} == {
        "source": False,
        "reference": True,
        "fuse": True,
        "quantise": True,
        "specialise": False,
        "prove": True,
        "package": False,
    }


def test_lines_say_what_each_stage_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        pipeline = Pipeline(tmp_path / "work", LineProgress(), {})
        with pipeline.opened():
            pipeline.stage("one", {}, lambda folder: time.sleep(0.06))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("[one] 0.")
    assert second.startswith("[one] as it was")


def test_plan_foretells_the_sizes(llama: Path, task_folder: Path, make_bundle: Build, tmp_path: Path) -> None:
    checkpoint, board = open_checkpoint(llama), buildable_board("cpu-x86_64")
    request = BuildRequest(llama, (task_folder,), Identity("tiny", "1", "cpu-x86_64"))
    estimate = plan(request, checkpoint, board, open_tasks((task_folder,), 256), 10**12)
    work = tmp_path / "work"
    make_bundle(tmp_path / "bundle", work=work)
    for step in estimate.steps:
        if step.stage in {"fuse", "quantise"}:
            found = sum(path.stat().st_size for path in (work / step.stage / "model").iterdir())
            assert 0.75 < step.writes_bytes / found < 1.1, step.stage
    assert weigh(checkpoint).elements == checkpoint.parameters
    assert any("golden" in line for line in plan_lines(estimate))


def test_larger_blocks_are_smaller(llama: Path) -> None:
    weights = weigh(open_checkpoint(llama))
    sizes = [int4_bytes(weights, QuantSettings("rtn", size)) for size in (32, 64, 128)]
    assert sizes == sorted(sizes, reverse=True)


def test_build_that_would_fill_the_disk_is_refused_with_both_numbers(llama: Path, tmp_path: Path) -> None:
    request = BuildRequest(llama, (), Identity("tiny", "1", "cpu-x86_64"))
    estimate = plan(request, open_checkpoint(llama), buildable_board("cpu-x86_64"), (), 0)
    work = tmp_path / "not" / "there" / "yet"
    require_work_space(estimate, work)
    with pytest.raises(EdgeError) as caught:
        require_work_space(replace(estimate, steps=(Step("fuse", "", 1 << 60, 0),)), work)
    assert caught.value.code == "disk.full"
    assert caught.value.context["needed_bytes"] == 1 << 60
