"""The graph keeps the contract: its interface, its caches, one copy of a tied embedding, nothing of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_agent.contract.manifest import ModelSpec, read_manifest
from edge_agent.errors import EdgeError
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.graphs.graph import _check_rotary, build_fp32, graph_shape, save_graph
from export.proof.greedy import StepModel
from export.proof.parity import between
from export.quantisation.quantize import METHODS, QuantSettings, quantize_int4
from export.stages.fuse import fp32_spec
from tests.export.conftest import TINY, change_config

CONTEXT = 128


def fp32_graph(checkpoint: Path, folder: Path) -> tuple[Path, ModelSpec]:
    opened = open_checkpoint(checkpoint)
    model = build_fp32(opened, CONTEXT)
    save_graph(model, folder / "fp32.onnx")
    return folder / "fp32.onnx", fp32_spec(opened, model, CONTEXT)


def test_graph_without_positions_is_refused(llama: Path) -> None:
    model = build_fp32(open_checkpoint(llama), CONTEXT)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "do_rotary":
                attribute.i = 0
    with pytest.raises(EdgeError) as caught:
        _check_rotary(model.graph.node)
    assert caught.value.code == "export.rotary_missing"


def test_graph_interface_is_the_one_of_the_contract(llama: Path) -> None:
    model = build_fp32(open_checkpoint(llama), CONTEXT)
    shape = graph_shape(model)
    caches = [f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")]
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", *caches]
    assert {o.name for o in model.graph.output} == {
        "logits",
        *(c.replace("past_key_values", "present") for c in caches),
    }
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (2, 2, 32)


def test_only_the_last_position_has_logits(int4_bundle: Path) -> None:
    session = ort.InferenceSession(str(int4_bundle / "model/decoder.onnx"))
    feeds: dict[str, Any] = {"input_ids": np.ones((1, 9), np.int64), "attention_mask": np.ones((1, 9), np.int64)}
    feeds |= {"query_seqlens": np.array([9], np.int32), "score_at": np.array([[0, 8]])}
    feeds |= {"position_ids": np.arange(9)[None], "attention_bias": np.zeros((1, 1, 9, 9), np.float32)}
    caches = {i.name: np.zeros((1, 2, 0, 32), np.float32) for i in session.get_inputs() if "past" in i.name}
    (logits,) = session.run(["logits"], {**feeds, **caches})
    assert logits.shape == (1, 1, 1024)


def test_rotary_tables_are_cut_to_the_context(llama: Path) -> None:
    model = build_fp32(open_checkpoint(llama), CONTEXT)
    tables = [t for t in model.graph.initializer if t.name.endswith(("cos_cache", "sin_cache"))]
    assert {tuple(t.dims) for t in tables} == {(CONTEXT, 16)}


def test_nothing_of_this_machine_is_in_the_graph(checkpoint: Path) -> None:
    raw = build_fp32(open_checkpoint(checkpoint), CONTEXT).SerializeToString()
    assert str(checkpoint).encode() not in raw
    assert b"edge-export-" not in raw


def test_large_weights_lie_beside_the_graph_and_load(llama: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(llama)
    model = build_fp32(opened, CONTEXT)
    spec = fp32_spec(opened, model, CONTEXT)
    inside = save_graph(model, tmp_path / "inside.onnx")
    outside = save_graph(model, tmp_path / "outside.onnx", external_from_bytes=0)
    assert [file.name for file in inside] == ["inside.onnx"]
    assert [file.name for file in outside] == ["outside.onnx", "outside.onnx.data"]
    assert outside[0].stat().st_size < 40_000
    left, right = (StepModel(files[0], spec) for files in (inside, outside))
    assert np.array_equal(left.step([1, 2, 3], left.start())[0], right.step([1, 2, 3], right.start())[0])


def test_tied_embedding_is_stored_once(int4_bundle: Path) -> None:
    model = onnx.load(int4_bundle / "model/decoder.onnx")
    lookup = next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    head = next(n for n in model.graph.node if "logits" in n.output)
    assert head.op_type == "MatMulNBits"
    assert lookup.input[0] == head.input[1]
    largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    assert len(largest.raw_data) == 1024 * 128 // 2
    assert not any(t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) > 65_536 for t in model.graph.initializer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_graph_stays_close_to_fp32(method: str, tied: bool, llama: Path, tmp_path: Path) -> None:  # noqa: FBT001
    source = llama
    if not tied:
        source = tmp_path / "untied"
        synthesise("smollm2-135m", source, layers=2, **TINY, tie_word_embeddings=False)
    graph, spec = fp32_graph(source, tmp_path)
    model = quantize_int4(build_fp32(open_checkpoint(source), CONTEXT), QuantSettings(method, 32))  # type: ignore[arg-type]
    assert all(n.op_type != "MatMul" for n in model.graph.node)
    save_graph(model, tmp_path / "int4.onnx")
    rng = np.random.default_rng(1)
    texts = [(rng.integers(0, 1024, 12).tolist(), rng.integers(0, 1024, 8).tolist()) for _ in range(3)]
    agreement = between(StepModel(graph, spec), StepModel(tmp_path / "int4.onnx", spec), texts)
    assert agreement.positions == 27
    # Wide random weights are the worst case for four bits; a wrong scale or a swapped nibble gives a KL above 5.
    assert agreement.mean_kl < 1.5


def test_block_that_does_not_divide_the_embedding_is_narrowed_there(tmp_path: Path) -> None:
    synthesise("smollm2-135m", tmp_path / "odd", layers=1, **{**TINY, "hidden_size": 96})
    graph, spec = fp32_graph(tmp_path / "odd", tmp_path)
    model = quantize_int4(build_fp32(open_checkpoint(tmp_path / "odd"), CONTEXT), QuantSettings("rtn", 128))
    lookup = next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    assert next(a.i for a in lookup.attribute if a.name == "block_size") == 32
    save_graph(model, tmp_path / "int4.onnx")
    agreement = between(StepModel(graph, spec), StepModel(tmp_path / "int4.onnx", spec), [([1, 2, 3], [4, 5])])
    assert agreement.mean_kl < 1.5


def test_odd_number_of_blocks_a_row_keeps_its_zero_points(llama: Path, tmp_path: Path) -> None:
    # 192 weights a row are three blocks of 64: two zero points in a byte, and one in a byte of its own.
    graph, spec = fp32_graph(llama, tmp_path)
    model = quantize_int4(build_fp32(open_checkpoint(llama), CONTEXT), QuantSettings("k_quant", 64))
    save_graph(model, tmp_path / "odd.onnx")
    agreement = between(StepModel(graph, spec), StepModel(tmp_path / "odd.onnx", spec), [([1, 2, 3], [4, 5])])
    assert agreement.mean_kl < 1.5


def test_wide_rope_context_is_not_shortened_below_the_request(checkpoint: Path) -> None:
    change_config(checkpoint, max_position_embeddings=64)
    model = build_fp32(open_checkpoint(checkpoint), CONTEXT)
    tables = [t for t in model.graph.initializer if t.name.endswith("cos_cache")]
    assert tables[0].dims[0] == 64


def test_caches_updated_in_place_continue_bit_exactly(int4_bundle: Path) -> None:
    """The same buffer bound as past and present, and a prefix reused by starting at its length."""
    spec = read_manifest(int4_bundle)[0].model
    plain = StepModel(int4_bundle / spec.decoder, spec)
    shared = SharedCaches(int4_bundle / spec.decoder, spec, capacity=48)
    rng = np.random.default_rng(2)
    prefix, first, second = (rng.integers(0, spec.vocab_size, n).tolist() for n in (7, 5, 11))
    _, prefix_past = plain.step(prefix, plain.start())
    shared.step(prefix, 0)
    for continuation in (
        first,
        second,
        first,
    ):  # the shorter again after the longer: what it left behind must not matter
        logits, past = plain.step(continuation, prefix_past)
        assert np.array_equal(shared.step(continuation, len(prefix)), logits)
        length = len(prefix) + len(continuation)
        for tokens in ([3, 1], [4, 1]):  # a single one would be run by a kernel that rounds otherwise
            logits, past = plain.step(tokens, past)
            assert np.array_equal(shared.step(tokens, length), logits)
            length += len(tokens)


class SharedCaches:
    """Fixed-capacity caches that the graph writes into itself."""

    def __init__(self, graph: Path, spec: ModelSpec, capacity: int) -> None:
        self._session = ort.InferenceSession(str(graph))
        empty = np.zeros((1, spec.num_kv_heads, capacity, spec.head_dim), np.float32)
        names = [f"{n}.{part}" for n in range(spec.num_layers) for part in ("key", "value")]
        self._caches = {name: ort.OrtValue.ortvalue_from_numpy(empty.copy()) for name in names}

    def step(self, ids: list[int], past_length: int) -> Any:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, past_length + len(ids)), np.int64))
        binding.bind_cpu_input("query_seqlens", np.array([len(ids)], np.int32))
        binding.bind_cpu_input("score_at", np.array([[0, len(ids) - 1]], np.int64))
        total = past_length + len(ids)
        binding.bind_cpu_input("position_ids", np.arange(past_length, total)[None])
        binding.bind_cpu_input("attention_bias", np.zeros((1, 1, len(ids), total), np.float32))
        binding.bind_output("logits")
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0][0, -1]
