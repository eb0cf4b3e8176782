"""A student keeps what its teacher uses, fits its teacher's tokenizer, and learns exactly what the device will ask."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import TaskSpec, load_task, parse_task
from edge_agent.errors import EdgeError
from export.checkpoint.model import load_model
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.commands.shrink import add_commands
from export.proof.greedy import GreedyDecoder
from export.smaller.distil import Distillation, distil
from export.smaller.lessons import LessonWriter, Row, batches
from export.smaller.prune import model_of_layers, probe_batches
from export.smaller.recovery import Training
from export.smaller.smaller_checkpoint import new_model, read_provenance
from export.smaller.student import begin_from, student_config
from export.smaller.teacher import Teacher, answer, choice_log_probs, final_states, fit, write_lessons
from tests.export.conftest import EVENTS, TASK, TINY, Build, change_weights

BRIEF = Training(minutes=None, steps=2, tokens=512)
ROWS = [Row(dict(event), None) for event in EVENTS]
OPEN_TASK = TASK.replace("    urgent:", "    note: {type: string, maxLength: 20}\n    urgent:")


def quiet(line: str) -> None:
    """Takes the log lines."""


@pytest.fixture(scope="session")
def task(task_folder: Path) -> TaskSpec:
    return load_task(task_folder / "task.yaml")


def shape_file(folder: Path, **shape: Any) -> str:
    path = folder / "shape.json"
    path.write_text(json.dumps(shape))
    return str(path)


def learn(source: Path, out: Path, task: TaskSpec, into: str, rows: list[Row] | None = None) -> dict[str, Any]:
    work = out.parent / f"{out.name}.training"
    return distil(source, out, task, rows or ROWS, Distillation(into, BRIEF), work=work, log=quiet)


def refused(source: Path, out: Path, task: TaskSpec, into: str) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(EdgeError) as caught:
        learn(source, out, task, into)
    assert sorted(out.parent.iterdir()) == before, "a refused student left something behind"
    return caught.value.code


def test_a_student_that_does_not_fit_the_tokenizer_is_refused(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    into = shape_file(tmp_path, hidden_size=64, vocab_size=512)
    assert refused(llama, tmp_path / "out", task, into) == "export.vocab_mismatch"


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 256},
        {"num_hidden_layers": 3},
        {},
        {"hidden_size": 128},
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"hidden_size": True},
        {"num_attention_heads": 3},
        {"head_dim": 31},
        {"hidden_size": 64, "model_type": "qwen2"},
        {"hidden_size": 64, "rope_theta": 5.0},
        {"hidden_size": 64, "widht": 3},
    ],
)
def test_a_shape_that_is_no_smaller_model_of_this_kind_is_refused(
    llama: Path, tmp_path: Path, task: TaskSpec, shape: dict[str, Any]
) -> None:
    assert refused(llama, tmp_path / "out", task, shape_file(tmp_path, **shape)) == "export.student_invalid"


@pytest.mark.parametrize("content", ["", "[]", "half", '{"hidden_size": 64'])
def test_a_shape_that_cannot_be_read_is_refused(llama: Path, tmp_path: Path, task: TaskSpec, content: str) -> None:
    (tmp_path / "shape.json").write_text(content)
    assert refused(llama, tmp_path / "out", task, str(tmp_path / "shape.json")) == "export.config_invalid"


def test_a_name_that_is_no_shape_is_refused(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    assert refused(llama, tmp_path / "out", task, "quarter-width") == "export.config_invalid"


@pytest.mark.parametrize(
    ("like", "changes"),
    [
        ("smollm2-135m", {}),
        ("qwen2.5-0.5b", {}),
        ("qwen3-0.6b", {}),
        ("gemma3-270m", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    ],
)
def test_channels_heads_and_neurons_that_carry_nothing_are_what_a_student_loses(
    tmp_path: Path, task: TaskSpec, like: str, changes: dict[str, Any]
) -> None:
    """A model inside a wider one, the rest of which is zero: the student must be that model, to the last logit."""
    synthesise(like, tmp_path / "wide", layers=2, **{**TINY, **changes})
    idle_channels, idle_neurons = torch.arange(0, 128, 2), torch.arange(96)
    idle_heads = torch.arange(64)  # the first two of four: one key-value head's group

    def empty(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if "embed_tokens" in name or "lm_head" in name:
                tensor[:, idle_channels] = 0
            if "o_proj.weight" in name or "down_proj.weight" in name:
                tensor[idle_channels] = 0
            if "o_proj.weight" in name:
                tensor[:, idle_heads] = 0
            if "down_proj.weight" in name:
                tensor[:, idle_neurons] = 0

    change_weights(tmp_path / "wide", empty)
    checkpoint = open_checkpoint(tmp_path / "wide")
    teacher = load_model(checkpoint)
    student = new_model(student_config("half-width", checkpoint), seed=3)
    lessons = write_lessons(ROWS, LessonWriter(checkpoint, task), teacher)
    assert begin_from(teacher, student, probe_batches(lessons, 4)) == 0
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        whole, small = teacher(ids).logits, student(ids).logits
    assert sum(p.numel() for p in student.parameters()) < 0.55 * sum(p.numel() for p in teacher.parameters())
    assert torch.allclose(whole, small, atol=2e-3 * float(whole.abs().max()))


def test_heads_of_another_size_begin_at_random_and_the_report_says_so(
    llama: Path, tmp_path: Path, task: TaskSpec
) -> None:
    facts = learn(llama, tmp_path / "student", task, shape_file(tmp_path, head_dim=16))
    assert facts["matrices_left_random"] == 2 * 4  # query, key, value and output of both layers


def test_half_the_depth_begins_as_the_layers_that_matter(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    checkpoint = open_checkpoint(llama)
    facts = learn(llama, tmp_path / "student", task, "half-depth")
    (kept,) = facts["kept_layers"]
    assert facts["shape"]["num_hidden_layers"] == 1
    shallow = model_of_layers(checkpoint, [kept])
    lessons = write_lessons(ROWS, LessonWriter(checkpoint, task), load_model(checkpoint))
    student = new_model(json.loads((tmp_path / "student" / "config.json").read_text()), seed=1)
    begin_from(shallow, student, probe_batches(lessons, 4))
    for name, tensor in shallow.state_dict().items():
        assert torch.allclose(student.state_dict()[name], tensor, rtol=1e-6), name


def test_a_student_builds_and_says_who_taught_it(
    llama: Path, tmp_path: Path, task: TaskSpec, make_bundle: Build
) -> None:
    learn(llama, tmp_path / "student", task, "half-both")
    (tmp_path / "task.yaml").write_text(TASK)
    result = make_bundle(tmp_path / "bundle", checkpoint=tmp_path / "student", tasks=(tmp_path,))
    assert result.manifest.model.num_layers == 1
    facts = read_provenance(tmp_path / "student")["distillation.json"]
    assert facts["parent"]["sha256"] == open_checkpoint(llama).sha256
    assert facts["parameters"] == open_checkpoint(tmp_path / "student").parameters


def test_the_same_call_gives_the_same_bytes_without_clock_or_path(llama: Path, tmp_path: Path, task: TaskSpec) -> None:
    for name in ("one", "two"):
        learn(llama, tmp_path / name / "student", task, "half-width")
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "student").iterdir()} for name in ("one", "two")
    )
    assert one == two
    assert str(tmp_path).encode() not in b"".join(one.values())


def test_a_teacher_answers_as_the_oracle_does(fp32_bundle: Path, llama: Path, task: TaskSpec) -> None:
    model = read_manifest(fp32_bundle)[0].model
    oracle = GreedyDecoder(fp32_bundle / model.decoder, fp32_bundle / model.tokenizer, model)
    checkpoint = open_checkpoint(llama)
    answers = answer(load_model(checkpoint), LessonWriter(checkpoint, task), EVENTS)
    assert answers == [oracle.decide(task, dict(event)).decision for event in EVENTS]


def test_a_lesson_asks_what_the_device_asks(fp32_bundle: Path, llama: Path, task: TaskSpec) -> None:
    """The ids are the oracle's prompt and answer, and the choices are its choices with its probabilities."""
    model = read_manifest(fp32_bundle)[0].model
    oracle = GreedyDecoder(fp32_bundle / model.decoder, fp32_bundle / model.tokenizer, model)
    checkpoint = open_checkpoint(llama)
    writer, network = LessonWriter(checkpoint, task), load_model(checkpoint)
    for event in EVENTS:
        decoded = oracle.decide(task, dict(event))
        lesson = writer.lesson(Row(dict(event), None), decoded.decision)
        assert list(lesson.ids) == [*oracle.prompt(task, dict(event)), *decoded.tokens]
        assert [len(point.allowed) for point in lesson.points] == [len(choice.logits) for choice in decoded.choices]
        (batch,) = probe_batches([lesson], 1)
        with torch.no_grad():
            found = choice_log_probs(network, final_states(network, batch.ids), batch)
        spoken = found.gather(1, batch.target[:, None]).squeeze(1).exp().tolist()
        assert spoken == pytest.approx([choice.probability() for choice in decoded.choices], abs=1e-3)


def test_a_field_that_only_a_person_can_fill_needs_labels(llama: Path, tmp_path: Path) -> None:
    open_task = parse_task(OPEN_TASK)
    with pytest.raises(EdgeError) as caught:
        learn(llama, tmp_path / "out", open_task, "half-width")
    assert caught.value.code == "export.unlabelled_open"
    answer_given = {"kind": "stop", "note": 'say "no"', "urgent": True, "rank": 3}
    labelled = [Row(row.event, answer_given) for row in ROWS]
    facts = learn(llama, tmp_path / "out", open_task, "half-width", labelled)
    assert facts["lessons"]["labelled"] == len(ROWS)


def test_free_text_is_learnt_token_by_token_up_to_its_closing_quote(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    given = {"kind": "stop", "note": "ok", "urgent": True, "rank": 3}
    lesson = LessonWriter(checkpoint, parse_task(OPEN_TASK)).lesson(Row(ROWS[0].event, given), given)
    model = load_model(checkpoint)
    (batch,) = batches([lesson], random.Random(0), tokens=512)
    free = [lesson.ids[point.at] for point in lesson.points if not point.allowed]
    assert batch.open_target.tolist() == free
    assert len(free) >= 2
    assert fit(model, Teacher(model), [batch]).kl_nats == 0


def test_an_event_that_the_task_cannot_read_is_refused_before_any_training(
    llama: Path, tmp_path: Path, task: TaskSpec
) -> None:
    with pytest.raises(EdgeError) as caught:
        learn(llama, tmp_path / "out", task, "half-width", [*ROWS, Row({"colour": "red"}, None)])
    assert caught.value.code == "export.data_invalid"
    assert caught.value.detail.startswith("event 5: event.no_known_field")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    parsed = parser.parse_args(arguments)
    status: int = parsed.command(parsed)
    return status


def test_both_commands_write_a_checkpoint_and_tidy_up(
    llama: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text("".join(json.dumps({"event": event}) + "\n" for event in EVENTS))
    shared = ("--task", str(task_folder), "--data", str(events), "--steps", "1")
    assert run("prune", str(llama), "--drop-layers", "1", "--out", str(tmp_path / "few"), *shared) == 0
    assert run("distil", str(llama), "--into", "half-width", "--out", str(tmp_path / "narrow"), "--json", *shared) == 0
    printed = capsys.readouterr().out
    first, rest = printed.split("\n", 1)
    assert first.startswith(f"{tmp_path / 'few'}  ")
    assert json.loads(rest)["shape"]["hidden_size"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "few", "narrow"]
    assert open_checkpoint(tmp_path / "few").parameters > open_checkpoint(tmp_path / "narrow").parameters
