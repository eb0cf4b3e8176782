"""What is done to a graph for the engine's sake leaves its numbers alone, and stores nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper, numpy_helper

from edge_agent.errors import EdgeError
from export.card.report import size_by_part
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.graphs.fusions import fuse_projections
from export.graphs.graph import (
    build_fp32,
    graph_shape,
    head_node,
    load_graph,
    save_graph,
    save_graphs,
    stored_with_others,
)
from export.graphs.int8_kv import measure_kv_scales, quantise_kv
from export.graphs.pruned_head import SLOTS, prune_head
from export.graphs.ragged import add_ragged
from export.graphs.split_head import HIDDEN, dynamic_head, split_head
from export.quantisation.coarse_table import coarsen_table
from export.quantisation.compact import compact_scales
from export.quantisation.quantize import Method, QuantSettings, quantize_int4
from tests.export.conftest import TINY

Floats = npt.NDArray[np.float32]
CONTEXT = 128
VOCAB = TINY["vocab_size"]
KEPT = np.array([0, 3, 4, 77, 500, 501, 1023], np.int32)
SHAPES = [
    ("smollm2-135m", {}),
    ("qwen2.5-0.5b", {}),
    ("qwen3-0.6b", {}),
    ("gemma3-270m", {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 32, "rope_theta": 1e6}),
]


@pytest.fixture(scope="module")
def fp32(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny graph, on disk: a test that changes it reads its own copy."""
    path = tmp_path_factory.mktemp("graph") / "fp32.onnx"
    save_graph(build_fp32(open_checkpoint(llama), CONTEXT), path)
    return path


@pytest.fixture(scope="module")
def int4(fp32: Path) -> Path:
    path = fp32.with_name("int4.onnx")
    save_graph(quantize_int4(load_graph(fp32), QuantSettings("rtn", 32)), path)
    return path


def session(model: ModelProto) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits(
    model: ModelProto, count: int = 9, ids: list[int] | None = None, stored: Path | None = None, **feeds: Any
) -> Floats:
    """Of a text without a past, float32 [rows]; by the graph as it is, or as it is stored."""
    shape = graph_shape(model)
    empty = np.zeros((1, shape.num_kv_heads, 0, shape.head_dim), np.float32)
    caches = {i.name: empty for i in model.graph.input if i.name.startswith("past_")}
    text = np.array([ids]) if ids else np.random.default_rng(0).integers(0, VOCAB, (1, count))  # [1, seq]
    mask = np.ones_like(text)
    name = model.graph.output[0].name
    loaded = session(model) if stored is None else ort.InferenceSession(stored, providers=["CPUExecutionProvider"])
    (scores,) = loaded.run([name], {"input_ids": text, "attention_mask": mask, **caches, **feeds})
    result: Floats = scores[0, -1]
    return result


@pytest.mark.parametrize(("like", "changes"), SHAPES, ids=[like for like, _ in SHAPES])
def test_projections_side_by_side_give_the_same_numbers(like: str, changes: dict[str, Any], tmp_path: Path) -> None:
    layers = changes.get("num_hidden_layers", 2)
    shape = {**TINY, **{k: v for k, v in changes.items() if k != "num_hidden_layers"}}
    synthesise(like, tmp_path / "checkpoint", layers=layers, **shape)
    save_graph(build_fp32(open_checkpoint(tmp_path / "checkpoint"), CONTEXT), tmp_path / "plain.onnx")
    plain, fused = load_graph(tmp_path / "plain.onnx"), load_graph(tmp_path / "plain.onnx")
    before = len([node for node in plain.graph.node if node.op_type == "MatMul"])
    gone = fuse_projections(fused)
    assert gone >= layers, "gate and up of every layer"
    assert len([node for node in fused.graph.node if node.op_type == "MatMul"]) == before - gone
    for count in (1, 7, 40):
        assert np.array_equal(logits(plain, count), logits(fused, count))
    assert fuse_projections(fused) == 0
    settings = QuantSettings("rtn", 32)
    assert np.array_equal(logits(quantize_int4(plain, settings)), logits(quantize_int4(fused, settings)))


def test_projection_that_shares_its_weight_is_left_alone(fp32: Path) -> None:
    model = load_graph(fp32)
    up = next(node for node in model.graph.node if "up_proj" in node.name)
    gate = next(node for node in model.graph.node if "gate_proj" in node.name)
    gate.input[1] = up.input[1]
    expected = logits(model)
    fuse_projections(model)
    assert np.array_equal(logits(model), expected)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_head_apart_gives_the_same_numbers(fp32: Path, int4: Path, precision: str, *, pruned: bool) -> None:
    model = load_graph(fp32 if precision == "fp32" else int4)
    if pruned:
        prune_head(model, KEPT)
    compact_scales(model)  # scales that body and head share go through one Cast
    expected = logits(model)
    decoder, head = split_head(model)
    assert decoder.graph.output[0].name == HIDDEN
    hidden = logits(decoder)[None, None]
    assert hidden.shape == (1, 1, TINY["hidden_size"])
    assert np.array_equal(session(head).run(["logits"], {HIDDEN: hidden})[0][0, 0], expected)


def test_shared_weights_are_written_once_and_read_back(int4: Path, tmp_path: Path) -> None:
    alone = sum(len(t.raw_data) for t in load_graph(int4).graph.initializer)
    decoder, head = split_head(load_graph(int4))
    hidden = logits(decoder)[None, None]
    expected = session(head).run(["logits"], {HIDDEN: hidden})[0]
    save_graphs({tmp_path / "decoder.onnx": decoder, tmp_path / "head.onnx": head})
    assert (tmp_path / "decoder.onnx.data").stat().st_size < alone + 4096 * len(decoder.graph.initializer)
    stored = ort.InferenceSession(tmp_path / "head.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(stored.run(["logits"], {HIDDEN: hidden})[0], expected)
    again = load_graph(tmp_path / "head.onnx")
    assert {t.name: t.raw_data for t in again.graph.initializer} == {t.name: t.raw_data for t in head.graph.initializer}


def test_large_weights_go_to_several_files(int4: Path, tmp_path: Path) -> None:
    model = load_graph(int4)
    largest = max(len(tensor.raw_data) for tensor in model.graph.initializer)
    files = save_graphs({tmp_path / "decoder.onnx": model}, 0, largest)
    assert [file.name for file in files[:3]] == ["decoder.onnx", "decoder.onnx.data", "decoder.onnx.data.1"]
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert all(file.stat().st_size <= largest for file in files[1:])
    assert np.array_equal(logits(load_graph(files[0])), logits(model))
    assert np.array_equal(logits(model, stored=files[0]), logits(model))


def test_rows_of_a_pruned_head_are_stored_with_the_table(int4: Path, tmp_path: Path) -> None:
    model = load_graph(int4)
    lookup = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    before = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    kept = np.arange(1, VOCAB, 2, dtype=np.int32)
    prune_head(model, kept)
    expected = logits(model)
    compact_scales(model)
    decoder, weights = save_graphs({tmp_path / "decoder.onnx": model}, 0)
    outside = ModelProto.FromString(decoder.read_bytes())
    places = {t.name: {e.key: e.value for e in t.external_data} for t in outside.graph.initializer}
    table, rows = places[lookup.input[0]], places[head_node(model).input[1]]
    assert (rows["location"], rows["offset"]) == (table["location"], table["offset"])
    assert int(rows["length"]) * VOCAB == int(table["length"]) * len(kept)
    assert weights.stat().st_size < before
    assert stored_with_others(decoder) == {head_node(model).input[1]}
    files_bytes = decoder.stat().st_size + weights.stat().st_size
    sizes = size_by_part(model, files_bytes, free=stored_with_others(decoder))
    assert sum(sizes.values()) == files_bytes
    assert 0 < sizes["structure"] < files_bytes / 2
    assert np.array_equal(logits(model, stored=decoder), expected)


def test_one_name_for_different_weights_is_refused(int4: Path, tmp_path: Path) -> None:
    decoder, head = split_head(load_graph(int4))
    shared = next(t for t in head.graph.initializer if len(t.raw_data) > 8192)
    shared.raw_data = bytes(len(shared.raw_data))
    with pytest.raises(EdgeError, match=shared.name) as caught:
        save_graphs({tmp_path / "decoder.onnx": decoder, tmp_path / "head.onnx": head})
    assert caught.value.code == "export.graph_unexpected"


def test_dynamic_head_scores_the_named_tokens_alone(int4: Path) -> None:
    whole = load_graph(int4)
    some = load_graph(int4)
    dynamic_head(some)
    expected = logits(whole)[KEPT]
    found = logits(some, candidate_ids=KEPT.astype(np.int64))
    # MatMulNBits rounds the hidden state to int8, the dynamic head does not.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "int4", "k_quant"])
def test_pruned_head_scores_the_kept_tokens_as_before(fp32: Path, int4: Path, precision: str) -> None:
    def graph() -> ModelProto:
        if precision == "k_quant":
            return quantize_int4(load_graph(fp32), QuantSettings("k_quant", 32))
        return load_graph(fp32 if precision == "fp32" else int4)

    model = graph()
    stored = sum(len(t.raw_data) for t in model.graph.initializer)
    prune_head(model, KEPT)
    rows = sum(len(t.raw_data) for t in model.graph.initializer if t.name.endswith(".kept") or t.name == SLOTS)
    assert sum(len(t.raw_data) for t in model.graph.initializer) <= stored + rows, "nothing else is stored again"
    assert logits(model).shape == KEPT.shape
    np.testing.assert_allclose(logits(model), logits(graph())[KEPT], rtol=1e-5, atol=1e-5)


def test_start_of_a_pruned_model_does_not_read_the_whole_table(int4: Path, tmp_path: Path) -> None:
    model = load_graph(int4)
    prune_head(model, KEPT)
    expected = logits(model)
    compact_scales(model)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    stored, folded = ({t.name for t in m.graph.initializer} for m in (model, load_graph(tmp_path / "folded.onnx")))
    lookup = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    table = {lookup.input[0], lookup.input[2]}
    assert table <= stored & folded, "as the lookup reads it, so that there was nothing to fold"
    assert head_node(model).input[1] in stored & folded
    assert np.array_equal(logits(model), expected)


def test_head_of_its_own_loses_the_rows_that_nobody_reads(tmp_path: Path) -> None:
    synthesise("smollm2-135m", tmp_path / "untied", layers=1, **TINY, tie_word_embeddings=False)
    save_graph(build_fp32(open_checkpoint(tmp_path / "untied"), CONTEXT), tmp_path / "fp32.onnx")
    for precision in ("fp32", "int4"):
        model = load_graph(tmp_path / "fp32.onnx")
        if precision == "int4":
            model = quantize_int4(model, QuantSettings("rtn", 32))
        expected = logits(model)[KEPT]
        stored = sum(len(t.raw_data) for t in model.graph.initializer)
        prune_head(model, KEPT)
        np.testing.assert_allclose(logits(model), expected, rtol=1e-5, atol=1e-5)
        saved = stored - sum(len(t.raw_data) for t in model.graph.initializer)
        assert saved >= (VOCAB - len(KEPT)) * TINY["hidden_size"] * (4 if precision == "fp32" else 0.5)


class Rows:
    """Caches of several sequences in one graph, written in place."""

    def __init__(self, model: ModelProto, rows: int, capacity: int) -> None:
        shape = graph_shape(model)
        self._session = session(model)
        names = [i.name for i in model.graph.input if i.name.startswith("past_")]
        dims = (rows, shape.num_kv_heads, capacity, shape.head_dim)
        dtype = np.int8 if "int8" in self._session.get_inputs()[2].type else np.float32
        self._caches = {name: np.zeros(dims, dtype) for name in names}
        self._lengths = np.zeros(rows, np.int64)
        self._ragged = any(i.name == "query_seqlens" for i in model.graph.input)

    def step(self, texts: list[list[int]]) -> Floats:
        """Logits after each row's last token, float32 [rows, vocab]."""
        counts = np.array([len(text) for text in texts], np.int32)
        ids = np.zeros((len(texts), counts.max()), np.int64)
        self._lengths += counts
        mask = np.arange(self._lengths.max()) < self._lengths[:, None]
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask.astype(np.int64))
        if self._ragged:
            binding.bind_cpu_input("query_seqlens", counts)
        binding.bind_output("logits")
        for name, cache in self._caches.items():
            place = ("cpu", 0, cache.dtype.type, cache.shape, cache.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        self._session.run_with_iobinding(binding)
        scores: Floats = binding.copy_outputs_to_cpu()[0][:, 0]
        return scores


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_rows_of_a_ragged_batch_continue_as_if_alone(fp32: Path, int4: Path, precision: str) -> None:
    model = load_graph(fp32 if precision == "fp32" else int4)
    plain = load_graph(fp32 if precision == "fp32" else int4)
    add_ragged(model)
    rng = np.random.default_rng(5)
    passes = [[rng.integers(0, VOCAB, count).tolist() for count in counts] for counts in ((7, 20, 13), (5, 1, 9))]
    batch = Rows(model, rows=3, capacity=48)
    together = [batch.step(texts) for texts in passes]
    for row in range(3):
        alone = Rows(plain, rows=1, capacity=48)
        for texts, found in zip(passes, together, strict=True):
            (expected,) = alone.step([texts[row]])
            # A row of one token takes another kernel for the same sum.
            np.testing.assert_allclose(found[row], expected, atol=2e-5 if precision == "fp32" else 0.15)


def test_padding_of_a_ragged_batch_cannot_be_seen(fp32: Path) -> None:
    model = load_graph(fp32)
    add_ragged(model)
    short = Rows(model, rows=2, capacity=48).step([[5, 6, 7], [1, 2, 3]])
    long = Rows(model, rows=2, capacity=48).step([[5, 6, 7], [1, 2, 3, 4, 8, 9, 9]])
    np.testing.assert_allclose(short[0], long[0], atol=2e-5)
    assert np.abs(short[1] - long[1]).max() > 0.1


def test_int8_caches_stay_close_over_a_long_text(fp32: Path) -> None:
    rng = np.random.default_rng(8)
    texts = [rng.integers(0, VOCAB, 40).tolist() for _ in range(6)]
    model, plain = load_graph(fp32), load_graph(fp32)
    scales = measure_kv_scales(model, texts)
    quantise_kv(model, scales)
    assert {i.type.tensor_type.elem_type for i in model.graph.input[2:]} == {3}, "caches are int8"
    small, exact = Rows(model, rows=1, capacity=48), Rows(plain, rows=1, capacity=48)
    small.step([texts[0][:30]])
    exact.step([texts[0][:30]])
    for token in texts[0][30:]:
        (found,), (expected,) = small.step([[token]]), exact.step([[token]])
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_scales_of_the_caches_are_the_largest_magnitudes(fp32: Path) -> None:
    texts = [[1, 2, 3, 4], [9, 8, 7]]
    scales = measure_kv_scales(load_graph(fp32), texts)
    shape = graph_shape(load_graph(fp32))
    assert {scale.shape for scale in scales.values()} == {(1, shape.num_kv_heads, 1, shape.head_dim)}
    more = measure_kv_scales(load_graph(fp32), [*texts, list(range(60))])
    assert all((more[name] >= scales[name]).all() for name in scales)


def test_graph_without_attention_is_no_ragged_graph() -> None:
    value = helper.make_tensor_value_info("x", 1, ["batch", 1])
    weight = numpy_helper.from_array(np.ones((1, 1), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["logits"])
    model = helper.make_model(helper.make_graph([node], "g", [value], [value], [weight]))
    with pytest.raises(EdgeError) as caught:
        add_ragged(model)
    assert caught.value.code == "export.graph_unexpected"


def looked_up(model: ModelProto, ids: list[int]) -> Floats:
    """Rows of the embedding as the first layer gets them, float32 [ids, hidden]."""
    part = ModelProto()
    part.CopyFrom(model)
    last = max(n for n, node in enumerate(part.graph.node) if node.name in ("embedding.rows", "embedding.either"))
    result = helper.make_tensor_value_info(part.graph.node[last].output[0], 1, None)
    del part.graph.node[last + 1 :], part.graph.output[:], part.graph.input[1:]
    part.graph.output.append(result)
    rows: Floats = session(part).run(None, {"input_ids": np.array([ids])})[0][0]
    return rows


@pytest.mark.parametrize("method", ["rtn", "k_quant"])
def test_coarse_rows_leave_the_domain_s_own_as_they_were(fp32: Path, method: Method) -> None:
    settings = QuantSettings(method, 32)
    kept = np.arange(0, VOCAB, 2, dtype=np.int32)
    plain = quantize_int4(load_graph(fp32), settings)
    coarse = quantize_int4(load_graph(fp32), settings)
    coarsen_table(coarse, kept)
    common, mixed = [4, 6, 500, 1022, 8], [4, 7, 501, 1023, 8]
    assert np.array_equal(logits(coarse, ids=common), logits(plain, ids=common)[kept])
    found, expected = looked_up(coarse, mixed), looked_up(plain, mixed)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error > 0).tolist() == [False, True, True, True, False]
    assert error.max() < 0.45, "two bits keep the direction of a row"
    size, before = (sum(len(t.raw_data) for t in m.graph.initializer) for m in (coarse, plain))
    assert size < before - (VOCAB - len(kept)) * TINY["hidden_size"] * 0.2


def test_coarse_rows_need_a_table_that_the_head_shares(fp32: Path) -> None:
    with pytest.raises(EdgeError) as caught:
        coarsen_table(load_graph(fp32), KEPT)
    assert caught.value.code == "export.graph_unexpected"
