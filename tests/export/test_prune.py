"""Pruning takes out the layer that does least, keeps the configuration true, recovers, and survives a power cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edge_agent.contract.document import to_document
from edge_agent.contract.task import TaskSpec, load_task
from edge_agent.errors import EdgeError
from export.checkpoint.model import load_model
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.smaller.importance import block_influences
from export.smaller.lessons import Batch, LessonWriter, Row, read_rows
from export.smaller.prune import Pruning, drop_layers, probe_batches
from export.smaller.recovery import INT4_NEVER, Taught, Training, teach
from export.smaller.smaller_checkpoint import read_provenance
from export.smaller.teacher import Teacher, fit, write_lessons
from tests.export.conftest import TINY, Build, change_config, change_weights

ROOT = Path(__file__).resolve().parents[2]
SHORT = Training(minutes=None, steps=12, tokens=512, peak_rate=3e-3)
MACHINES = ("press-4", "oven-1", "robot-7", "pump-2", "mill-9")
FINDINGS = ("pressure low", "temperature above limit", "door open", "no signal", "bearing noise", "motor hot")


def quiet(line: str) -> None:
    """Takes the log lines."""


@pytest.fixture(scope="session")
def task(task_folder: Path) -> TaskSpec:
    return load_task(task_folder / "task.yaml")


def rows_without_decision() -> list[Row]:
    return [Row({"machine": machine, "text": text}, None) for machine in MACHINES for text in FINDINGS]


def four_layers(
    folder: Path, idle: int | None = None, like: str = "smollm2-135m", layers: int = 4, **changes: Any
) -> Path:
    """A checkpoint with a layer that adds nothing to the residual stream."""
    synthesise(like, folder, layers=layers, **{**TINY, **changes})

    def silence(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if f"layers.{idle}." in name and ("o_proj" in name or "down_proj" in name):
                tensor.zero_()

    if idle is not None:
        change_weights(folder, silence)
    return folder


def prune(source: Path, out: Path, task: TaskSpec, drop: int = 1, training: Training | None = None) -> dict[str, Any]:
    work = out.parent / f"{out.name}.training"
    rows = rows_without_decision()
    return drop_layers(source, out, task, rows, Pruning(drop, training), work=work, log=quiet)


def logits_of(checkpoint: Path) -> torch.Tensor:
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        logits: torch.Tensor = load_model(open_checkpoint(checkpoint))(ids).logits
    return logits


@pytest.mark.parametrize("idle", [0, 2, 3])
def test_the_layer_that_adds_nothing_is_the_one_that_goes(tmp_path: Path, task: TaskSpec, idle: int) -> None:
    source = four_layers(tmp_path / "whole", idle)
    facts = prune(source, tmp_path / "few", task)
    assert facts["dropped"] == [idle]
    assert torch.equal(logits_of(tmp_path / "few"), logits_of(source))
    (measured,) = facts["rounds"]
    assert measured["layers"][idle]["influence"] == 0


def test_what_was_measured_before_a_drop_is_not_believed_after_it(tmp_path: Path, task: TaskSpec) -> None:
    facts = prune(four_layers(tmp_path / "whole", 1), tmp_path / "few", task, drop=2)
    first, second = facts["rounds"]
    assert [entry["layer"] for entry in second["layers"]] == [0, 2, 3]
    kl = {entry["layer"]: entry["kl_nats"] for entry in second["layers"]}
    assert second["dropped"] == min(kl, key=lambda layer: kl[layer])
    assert first["dropped"] == 1
    assert facts["kept"] == [layer for layer in range(4) if layer not in facts["dropped"]]


def test_in_a_deep_model_only_layers_of_little_influence_are_tried(tmp_path: Path, task: TaskSpec) -> None:
    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    facts = prune(four_layers(tmp_path / "whole", 9, layers=12, **small), tmp_path / "few", task)
    (measured,) = facts["rounds"]
    tried = [entry["influence"] for entry in measured["layers"] if entry["kl_nats"] is not None]
    passed_over = [entry["influence"] for entry in measured["layers"] if entry["kl_nats"] is None]
    assert len(tried) == 8
    assert max(tried) <= min(passed_over)
    assert facts["dropped"] == [9]


def test_padding_takes_no_part_in_a_layers_influence(tmp_path: Path, task: TaskSpec) -> None:
    checkpoint = open_checkpoint(four_layers(tmp_path / "whole"))
    model = load_model(checkpoint)
    lessons = write_lessons(rows_without_decision()[:6], LessonWriter(checkpoint, task), model)
    together, apart = (
        block_influences(model, [b for part in parts for b in probe_batches(part, 6)])
        for parts in ([lessons], [[lesson] for lesson in lessons])
    )
    assert together == pytest.approx(apart, rel=1e-4)


def test_layers_keep_their_kind_of_attention_when_their_number_changes(tmp_path: Path, task: TaskSpec) -> None:
    # Layer 5 of 7 is the global one; what follows from a layer's number would make it local after the drop.
    gemma = four_layers(tmp_path / "gemma", 2, "gemma3-270m", 7, sliding_window=16, query_pre_attn_scalar=32)
    facts = prune(gemma, tmp_path / "few", task)
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    assert facts["dropped"] == [2]
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [*["sliding_attention"] * 4, "full_attention", "sliding_attention"]
    assert torch.equal(logits_of(tmp_path / "few"), logits_of(gemma))


def test_a_window_that_follows_from_a_layers_number_is_written_out(tmp_path: Path, task: TaskSpec) -> None:
    qwen = four_layers(tmp_path / "qwen", 0, "qwen2.5-0.5b", head_dim=32)
    change_config(qwen, use_sliding_window=True, sliding_window=16, max_window_layers=2, layer_types=None)
    prune(qwen, tmp_path / "few", task)
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert torch.equal(logits_of(tmp_path / "few"), logits_of(qwen))


def test_weights_that_stay_are_the_same_bytes(tmp_path: Path, task: TaskSpec) -> None:
    source = four_layers(tmp_path / "whole", 1)
    prune(source, tmp_path / "few", task)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "few"))
    renamed = {"layers.0.": "layers.0.", "layers.1.": "layers.2.", "layers.2.": "layers.3."}
    for name, tensor in after.items():
        source_name = next((name.replace(new, old) for new, old in renamed.items() if new in name), name)
        assert tensor.dtype == before[source_name].dtype
        assert torch.equal(tensor, before[source_name]), name
    assert (tmp_path / "few" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_pruned_checkpoint_builds_and_says_where_it_came_from(
    tmp_path: Path, task: TaskSpec, make_bundle: Build
) -> None:
    source = four_layers(tmp_path / "whole", 1)
    prune(source, tmp_path / "few", task)
    (tmp_path / "task.yaml").write_text(json.dumps(to_document(task, exclude_none=True)))
    result = make_bundle(tmp_path / "bundle", checkpoint=tmp_path / "few", tasks=(tmp_path,))
    assert result.manifest.model.num_layers == 3
    facts = read_provenance(tmp_path / "few")["pruning.json"]
    assert facts["parent"] == {
        "sha256": open_checkpoint(source).sha256,
        "architecture": "llama",
        "parameters": open_checkpoint(source).parameters,
        "layers": 4,
    }


@pytest.mark.parametrize("drop", [-1, 0, 2, 9])
def test_dropping_no_layer_or_all_is_refused(llama: Path, tmp_path: Path, task: TaskSpec, drop: int) -> None:
    with pytest.raises(EdgeError) as caught:
        prune(llama, tmp_path / "out", task, drop)
    assert caught.value.code == "export.layers_invalid"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("minutes", "steps"), [(None, None), (1.0, 5), (0.0, None), (None, 0), (float("nan"), None), (float("inf"), None)]
)
def test_a_budget_that_is_none_is_refused(
    llama: Path, tmp_path: Path, task: TaskSpec, minutes: float | None, steps: int | None
) -> None:
    with pytest.raises(EdgeError) as caught:
        prune(llama, tmp_path / "out", task, 1, Training(minutes=minutes, steps=steps))
    assert caught.value.code == "export.budget_invalid"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "export.data_invalid"),
        (b"\xff\xfe", "export.data_unreadable"),
        (b"[1]\n", "export.data_invalid"),
        (b'{"event": {"machine": "x"}}\n{"event": {"machine": {"nested": 1}}}\n', "export.data_invalid"),
        (b'{"event": {"machine": "x"}, "decision": {"kind": "jump"}}\n', "export.data_invalid"),
        (b'{"event": {"machine": "x"}, "decision": "stop"}\n', "export.data_invalid"),
    ],
)
def test_a_wrong_line_of_events_is_refused_by_its_number(
    tmp_path: Path, task: TaskSpec, content: bytes, code: str
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(content)
    with pytest.raises(EdgeError) as caught:
        read_rows(file, task)
    assert caught.value.code == code


def test_the_folder_of_somebody_else_is_not_replaced(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(EdgeError) as caught:
        prune(llama, tmp_path / "mine", task)
    assert caught.value.code == "export.out_exists"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


class PowerCut(Teacher):
    """A teacher whose plug is pulled after some answers."""

    def __init__(self, model: Any, answers: int) -> None:
        super().__init__(model)
        self.left = answers

    def log_probs(self, batch: Batch) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().log_probs(batch)


class Pupil:
    """A damaged student with its teacher and lessons, made the same way each time."""

    def __init__(self, checkpoint: Path, task: TaskSpec) -> None:
        opened = open_checkpoint(checkpoint)
        self.whole, self.student = load_model(opened), load_model(opened)
        self.lessons = write_lessons(rows_without_decision(), LessonWriter(opened, task), self.whole)
        with torch.no_grad():
            self.student.model.layers[1].mlp.down_proj.weight.zero_()

    def learn(self, work: Path, training: Training, teacher: Teacher | None = None) -> Taught:
        work.mkdir(exist_ok=True)
        return teach(self.student, teacher or Teacher(self.whole), self.lessons, training, work, quiet)


def test_recovery_brings_the_answers_back_towards_the_whole_model(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    pupil = Pupil(llama, task)
    probe = probe_batches(pupil.lessons, len(pupil.lessons))
    before = fit(pupil.student, Teacher(pupil.whole), probe)
    pupil.learn(tmp_path, Training(minutes=None, steps=30, tokens=512, int4_from=INT4_NEVER))
    after = fit(pupil.student, Teacher(pupil.whole), probe)
    assert before.kl_nats is not None
    assert after.kl_nats is not None
    assert after.kl_nats < 0.3 * before.kl_nats


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    straight, cut = Pupil(llama, task), Pupil(llama, task)
    training = Training(minutes=None, steps=9, tokens=400, save_s=0)
    taught = straight.learn(tmp_path / "straight", training)
    with pytest.raises(KeyboardInterrupt):
        cut.learn(tmp_path / "cut", training, PowerCut(cut.whole, 5))
    resumed = Pupil(llama, task)
    assert resumed.learn(tmp_path / "cut", training) == taught
    for name, tensor in straight.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name
        assert name not in cut.student.state_dict() or tensor.shape == cut.student.state_dict()[name].shape


@pytest.mark.parametrize("damage", ["cut short", "another training"])
def test_a_state_that_does_not_fit_is_not_built_upon(llama: Path, tmp_path: Path, task: TaskSpec, damage: str) -> None:
    training = Training(minutes=None, steps=3, tokens=400, save_s=0)
    expected = Pupil(llama, task).learn(tmp_path / "fresh", training)
    work = tmp_path / "work"
    Pupil(llama, task).learn(work, Training(minutes=None, steps=2, tokens=400, save_s=0, seed=1))
    if damage == "cut short":
        state = work / "state.pt"
        state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    assert Pupil(llama, task).learn(work, training) == expected


def test_a_rate_that_blows_the_weights_up_is_told(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    pupil = Pupil(llama, task)
    with torch.no_grad():
        pupil.student.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(EdgeError) as caught:
        pupil.learn(tmp_path, SHORT)
    assert caught.value.code == "export.recovery_diverged"


def test_minutes_become_steps_once_and_are_not_forgotten(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    training = Training(minutes=0.01, tokens=400, save_s=0)
    cut = Pupil(llama, task)
    with pytest.raises(KeyboardInterrupt):
        # 4 rehearsed steps and one more before them, then two of the training.
        cut.learn(tmp_path, training, PowerCut(cut.whole, 7))
    steps = torch.load(tmp_path / "state.pt", weights_only=True)["steps"]
    assert Pupil(llama, task).learn(tmp_path, training).steps == steps


SCRIPT = """
import sys
from pathlib import Path
from edge_agent.contract.task import load_task
from export.smaller.lessons import read_rows
from export.smaller.prune import Pruning, drop_layers
from export.smaller.recovery import Training
source, out, task_file, events, work = map(Path, sys.argv[1:])
task = load_task(task_file)
training = Training(minutes=None, steps=100_000, tokens=256, save_s=0)
drop_layers(source, out, task, read_rows(events, task), Pruning(1, training), work=work, log=print)
"""


@pytest.mark.slow
def test_a_power_cut_leaves_no_half_checkpoint_and_the_training_goes_on(
    tmp_path: Path, task_folder: Path, task: TaskSpec
) -> None:
    source = four_layers(tmp_path / "whole", 1)
    events, out, work = tmp_path / "events.jsonl", tmp_path / "out", tmp_path / "work"
    events.write_text("".join(json.dumps({"event": row.event}) + "\n" for row in rows_without_decision()))
    arguments = [str(path) for path in (source, out, task_folder / "task.yaml", events, work)]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, start_new_session=True)
    deadline_s = time.monotonic() + 90
    while not (work / "state.pt").is_file():
        assert process.poll() is None, "the training ended before its plug was pulled"
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    step = torch.load(work / "state.pt", weights_only=True)["step"]
    assert step >= 1
    lines: list[str] = []
    training = Training(minutes=None, steps=100_000, tokens=256, save_s=0)
    with pytest.raises(KeyboardInterrupt):
        drop_layers(source, out, task, read_rows(events, task), Pruning(1, training), work=work, log=stop_after(lines))
    assert f"resumed at step {step} of 100000" in lines


def stop_after(lines: list[str]) -> Any:
    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("resumed"):
            raise KeyboardInterrupt

    return log


def test_training_that_makes_it_worse_is_undone(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    pupil = Pupil(llama, task)
    first = {name: tensor.clone() for name, tensor in pupil.student.state_dict().items()}
    lines: list[str] = []
    ruinous = Training(minutes=None, steps=6, peak_rate=0.9, int4_from=2.0)
    taught = teach(pupil.student, Teacher(pupil.whole), pupil.lessons, ruinous, tmp_path, lines.append)
    assert not taught.kept
    assert not taught.after.is_better_than(taught.before)
    assert any("undone" in line for line in lines)
    for name, tensor in pupil.student.state_dict().items():
        assert torch.equal(tensor, first[name]), name
