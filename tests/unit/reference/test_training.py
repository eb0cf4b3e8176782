"""Faults of a training run: weights that the device will not have, a lost state, a checkpoint nobody can load."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from edge_agent.contract.task import load_task
from edge_agent.errors import PermanentError
from export.reference import heldout
from export.reference.checkpoint import load_checkpoint
from export.reference.cues import CUE_CLASSES, cue_labels
from export.reference.evaluate import TASK_FILE, compare, evaluate_checkpoint, measure
from export.reference.examples import Encoder, canonical_answer
from export.reference.forward import hidden_states
from export.reference.generator import generate
from export.reference.tokenizer import load_tokenizer
from export.reference.train import Shape, Trainer, Training, build_model, rate_at
from export.smaller.rounding import int4_weights, round_to_int4

TINY = Shape(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=96, positions=256)
SHORT = Training(steps=20, tokens=600, tokenizer_events=1500, validation_events=8, int4_from=0.7, threads=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("run")
    Trainer(work, TINY, SHORT).run()
    return work


def test_short_run_leaves_a_checkpoint_that_answers_within_the_schema(trained: Path) -> None:
    events = list(islice(generate("validation", 2), 12))
    accuracy = evaluate_checkpoint(trained / "checkpoint", events)
    assert accuracy.rows == 12
    assert set(accuracy.fields) == {field.name for field in load_task(TASK_FILE).output_fields}


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    task = load_task(TASK_FILE)
    trainer = Trainer(tmp_path, TINY, Training(steps=40, tokens=600, tokenizer_events=1500, int4_from=2.0, threads=1))
    first, *_, last = [trainer._update(batch) for batch in islice(trainer._batches(), 30)]  # noqa: SLF001
    assert last < first
    assert task.name == "triage"


def test_resumed_run_goes_on_where_it_stopped(trained: Path) -> None:
    again = Trainer(trained, TINY, SHORT)
    assert again._step == SHORT.steps  # noqa: SLF001
    saved = load_checkpoint(trained / "checkpoint").state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.allclose(tensor, saved[name], atol=1e-3), name


def test_forward_pass_for_training_is_that_of_the_library() -> None:
    model = build_model(TINY, 512, seed=3, eos_id=1, pad_id=0)
    ids = torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.model(ids, output_hidden_states=True)
        inputs, final = hidden_states(model, ids)
    assert torch.allclose(final, expected.last_hidden_state, atol=1e-5)
    for ours, theirs in zip(inputs, expected.hidden_states[:-1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_checkpoint_holds_no_state_of_training(trained: Path) -> None:
    files = {path.name for path in (trained / "checkpoint").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}  # fmt: skip
    configuration = json.loads((trained / "checkpoint" / "config.json").read_text())
    assert configuration["architectures"] == ["LlamaForCausalLM"]
    assert configuration["bos_token_id"] is None


def test_missing_checkpoint_has_a_code(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"checkpoint\.unreadable"):
        load_checkpoint(tmp_path / "nowhere")


def test_int4_rounding_has_sixteen_levels_a_block_and_is_stable() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    rounded = round_to_int4(weight)
    for block in rounded.reshape(-1, 32):
        assert len(block.unique()) <= 16
    assert torch.equal(round_to_int4(rounded), rounded)
    # A positive extreme takes step -8, so the far negative side clips at step 7: an error of at most one step.
    extremes = weight.reshape(-1, 32).abs().amax(dim=1) / 8
    assert bool(((weight - rounded).reshape(-1, 32).abs().amax(dim=1) <= extremes * 1.001).all())


def test_int4_rounding_of_zeros_is_zero() -> None:
    assert torch.equal(round_to_int4(torch.zeros(2, 32)), torch.zeros(2, 32))


def test_int4_weights_are_taken_back_even_after_a_fault() -> None:
    layer = torch.nn.Linear(32, 4)
    before = layer.weight.detach().clone()

    def fail_inside() -> None:
        with int4_weights(layer):
            assert not torch.equal(layer.weight, before)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert torch.equal(layer.weight, before)


def test_int4_rounding_is_that_of_onnxruntime() -> None:
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    helper = pytest.importorskip("onnx").helper
    numpy_helper = pytest.importorskip("onnx").numpy_helper
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))  # (outputs, inputs)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 64])],
        [helper.make_tensor_value_info("y", 1, [1, 16])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4)
    wrapped = quantizer.MatMulNBitsQuantizer(model, algo_config=config)
    wrapped.process()
    tensors = {t.name: numpy_helper.to_array(t) for t in wrapped.model.model.graph.initializer}
    packed = torch.tensor(next(t for name, t in tensors.items() if "Q4" in name or "quant" in name).astype("int16"))
    scales = torch.tensor(next(t for name, t in tensors.items() if "scale" in name)).reshape(16, 2, 1)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(16, 2, 32) - 8
    assert torch.allclose((nibbles * scales).reshape(16, 64), round_to_int4(weight), atol=1e-6)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    training = Training(peak_rate=1.0, warmup=0.1)
    assert rate_at(0.0, training) == 0.0
    assert rate_at(0.1, training) == pytest.approx(1.0)
    assert rate_at(1.0, training) == pytest.approx(0.0)


def test_cue_labels_fit_their_heads() -> None:
    for labelled in islice(generate("train", 6), 1000):
        labels = cue_labels(labelled.situation)
        assert len(labels) == len(CUE_CLASSES)
        assert all(0 <= label < classes for label, classes in zip(labels, CUE_CLASSES, strict=True))


def test_only_values_carry_full_weight(trained: Path) -> None:
    task, tokenizer = load_task(TASK_FILE), load_tokenizer(trained / "checkpoint")
    labelled = next(generate("train", 12))
    example = Encoder(tokenizer, task).examples([labelled])[0]
    weighted = [tokenizer.decode([i]) for i, w in zip(example.ids, example.weights, strict=True) if w >= 1.0]
    assert "".join(weighted) == "".join(str(v).lower() for v in labelled.decision.values())
    answer = tokenizer.encode(canonical_answer(labelled.decision), add_special_tokens=False).ids
    assert list(example.ids[example.prompt_tokens : -1]) == answer


def test_accuracy_counts_fields_and_whole_answers() -> None:
    gold = [row.decision for row in islice(generate("test", 1), 4)]
    wrong = {**gold[0], "severity": "info" if gold[0]["severity"] != "info" else "low"}
    accuracy = compare([wrong, *gold[1:]], gold)
    assert accuracy.fields["severity"] == 0.75
    assert accuracy.fields["category"] == 1.0
    assert accuracy.exact == 0.75
    assert accuracy.confusions[0][0] == "severity"
    assert "severity" in accuracy.as_text()


def test_perfect_backend_measures_as_perfect() -> None:
    rows = [(row.event, row.decision) for row in islice(generate("test", 1), 50)]
    answers = {json.dumps(event): decision for event, decision in rows}
    assert measure(lambda event: answers[json.dumps(event)], rows).exact == 1.0


def test_committed_heldout_rows_are_those_of_the_generator() -> None:
    rows = heldout.load_rows()
    fresh = [(row.event, row.decision) for row in islice(generate("test", 1), len(rows))]
    assert list(rows) == fresh
    assert len(rows) >= 1000
