"""Eight bits by rows: what a row gives depends on that row alone, stays exact, and hides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edge_agent.contract.manifest import ModelSpec
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.graphs.fusions import fuse_projections
from export.graphs.graph import EMBEDDING, build_fp32, graph_shape, load_graph, save_graph
from export.graphs.int8_kv import measure_kv_scales, quantise_kv
from export.graphs.pruned_head import prune_head
from export.graphs.ragged import add_ragged
from export.graphs.split_head import HIDDEN, split_head
from export.proof.greedy import StepModel
from export.proof.parity import Agreement, between
from export.quantisation.coarse_table import coarsen_table
from export.quantisation.compact import compact_scales
from export.quantisation.int8_rows import quantise_rows, round_columns
from export.quantisation.quantize import METHODS, Method, QuantSettings, quantize_int4
from export.stages.fuse import fp32_spec
from tests.export.conftest import TINY
from tests.export.test_engine_graph import CONTEXT, KEPT, SHAPES, VOCAB, Rows, logits, session
from tests.export.test_parity import TESTED, make_checkpoint

Floats = npt.NDArray[np.float32]
INPUTS, OUTPUTS = 192, 80
NEAR = 0.02
"""Of the largest number of a product: what eight bits may do, where a wrong scale or a transposed weight gives 1."""
FAR = 0.2
"""Of the logits' length: what two layers of wide random weights may make of it. They amplify; a fault gives 1."""


@pytest.fixture(scope="module")
def fp32(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "fp32.onnx"
    model = build_fp32(open_checkpoint(llama), CONTEXT)
    fuse_projections(model)
    save_graph(model, path)
    return path


def int8(fp32: Path, method: Method = "rtn") -> ModelProto:
    model = load_graph(fp32)
    quantise_rows(model)
    return quantize_int4(model, QuantSettings(method, 32))


def distance(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def random_rows(count: int, columns: int = INPUTS, seed: int = 0) -> Floats:
    """float32 [1, count, columns], rows of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-3, 3, (count, 1))
    return (rng.standard_normal((1, count, columns)) * sizes).astype(np.float32)


def weight(inputs: int = INPUTS, outputs: int = OUTPUTS) -> Floats:
    return np.random.default_rng(7).standard_normal((outputs, inputs)).astype(np.float32) * np.float32(0.05)


def projection(stored: Floats) -> Any:
    """One projection by ``stored`` [outputs, inputs], quantised: gives x -> product, [1, rows, outputs]."""
    outputs, inputs = stored.shape
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "rows", columns])
        for name, columns in (("x", inputs), ("product", outputs), ("logits", 8))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="projection"),
        helper.make_node("MatMul", ["product", "head"], ["logits"], name="head"),
    ]
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(stored.T), "weight"),
        numpy_helper.from_array(np.ones((outputs, 8), np.float32), "head"),
    ]
    graph = helper.make_graph(nodes, "projection", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    quantise_rows(model)
    assert [node.op_type for node in model.graph.node].count("MatMul") == 1, "the head is left alone"
    opened = session(model)
    return lambda x: opened.run(["product"], {"x": x})[0]


def test_row_alone_is_bit_for_bit_the_row_among_any_others() -> None:
    multiply = projection(weight())
    rows = random_rows(70)
    together = multiply(rows)
    for first, last in ((0, 1), (3, 4), (69, 70), (0, 7), (5, 70), (10, 43)):
        assert np.array_equal(multiply(rows[:, first:last]), together[:, first:last])
    assert np.array_equal(multiply(rows[:, ::-1])[:, ::-1], together)


def test_product_is_near_the_exact_one_whatever_a_row_s_size() -> None:
    stored = weight(INPUTS, INPUTS)  # square: a transposed weight would fit
    rows = random_rows(40)
    exact = rows[0] @ stored.T
    error = np.abs(projection(stored)(rows)[0] - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert error.max() < NEAR


def test_row_of_zeros_gives_zeros_exactly() -> None:
    rows = random_rows(5)
    rows[0, 2] = 0
    product = projection(weight())(rows)
    assert (product[0, 2] == 0).all()
    assert np.isfinite(product).all()


@pytest.mark.parametrize("inputs", [17, INPUTS])
def test_nan_anywhere_in_a_row_is_not_hidden_and_stays_in_its_row(inputs: int) -> None:
    multiply = projection(weight(inputs))
    for place in range(inputs):
        rows = random_rows(3, inputs)
        rows[0, 1, place] = np.nan
        product = multiply(rows)
        assert np.isnan(product[0, 1]).all(), place
        assert np.isfinite(product[0, [0, 2]]).all()


@pytest.mark.parametrize(("like", "changes"), TESTED, ids=[f"{like}-{n}" for n, (like, _) in enumerate(TESTED)])
def test_nan_of_an_earlier_token_reaches_the_scores(like: str, changes: dict[str, Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", like, {**changes, "tie_word_embeddings": False})
    model = build_fp32(open_checkpoint(tmp_path / "checkpoint", allow_large=True), CONTEXT)
    layers = graph_shape(model).num_layers
    quantise_rows(model)
    means = sum(node.op_type == "ReduceMean" and node.name.endswith(".mean") for node in model.graph.node)
    assert means == 2 * layers, "what attention reads and what it gives; the rest is carried by the residual stream"
    assert np.isfinite(logits(model, ids=list(range(3, 13)))).all()
    table = next(tensor for tensor in model.graph.initializer if tensor.name == EMBEDDING)
    weights = numpy_helper.to_array(table).copy()
    weights[5, 0] = np.nan
    table.CopyFrom(numpy_helper.from_array(weights, EMBEDDING))
    assert np.isnan(logits(model, ids=list(range(3, 13)))).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_in_a_row_is_not_hidden(value: float) -> None:
    rows = random_rows(3)
    rows[0, 1, 5] = value
    product = projection(weight())(rows)
    assert not np.isfinite(product[0, 1]).any()
    assert np.isfinite(product[0, [0, 2]]).all()


@pytest.mark.parametrize("inputs", [2, 3, 17, INPUTS])
@pytest.mark.parametrize("kind", ["normal", "equal", "negative", "outlier", "alternating"])
def test_no_two_neighbours_can_saturate_16_bits(kind: str, inputs: int) -> None:
    rng = np.random.default_rng(2)
    matrix = {
        "normal": rng.standard_normal((64, inputs)),
        "equal": np.full((64, inputs), 0.3),
        "negative": np.full((64, inputs), -0.7),
        "outlier": np.where(np.arange(inputs) == 1, 900.0, rng.standard_normal((64, inputs))),
        "alternating": np.where(np.arange(inputs) % 2, 1.0, -1.0) * np.ones((64, 1)),
    }[kind].astype(np.float32)
    codes = round_columns(torch.from_numpy(matrix)).codes.astype(np.int64)  # [inputs, outputs]
    pairs = np.pad(codes, [(0, inputs % 2), (0, 0)]).reshape(-1, 2, codes.shape[1])
    largest_activation = 255
    assert largest_activation * pairs.clip(min=0).sum(axis=1).max() <= np.iinfo(np.int16).max
    assert largest_activation * pairs.clip(max=0).sum(axis=1).min() >= np.iinfo(np.int16).min
    assert np.abs(codes).max() > 60, "the room is used"


def test_scale_of_neighbours_costs_less_than_a_bit() -> None:
    matrix = torch.from_numpy(weight())
    error = np.square(round_columns(matrix).dequantised() - matrix.numpy()).sum()
    step = matrix.abs().amax(1, keepdim=True) / 63  # a bit less, as ONNX Runtime's own quantiser avoids saturation
    coarse = ((matrix / step).round() * step - matrix).square().sum()
    assert error < 0.5 * float(coarse)


def test_output_without_weights_is_zero() -> None:
    stored = weight()
    stored[3] = 0
    product = projection(stored)(random_rows(4))
    assert (product[..., 3] == 0).all()
    assert np.isfinite(product).all()


@pytest.mark.parametrize(("like", "changes"), SHAPES, ids=[like for like, _ in SHAPES])
@pytest.mark.parametrize("tied", [True, False])
def test_graph_stays_near_fp32(like: str, changes: dict[str, Any], tmp_path: Path, *, tied: bool) -> None:
    layers = changes.get("num_hidden_layers", 2)
    shape = {**TINY, **{k: v for k, v in changes.items() if k != "num_hidden_layers"}, "tie_word_embeddings": tied}
    synthesise(like, tmp_path / "checkpoint", layers=layers, **shape)
    save_graph(build_fp32(open_checkpoint(tmp_path / "checkpoint"), CONTEXT), tmp_path / "fp32.onnx")
    # Table and head left in fp32: what is measured is the projections.
    exact, rows = load_graph(tmp_path / "fp32.onnx"), load_graph(tmp_path / "fp32.onnx")
    quantise_rows(rows)
    assert {node.op_type for node in rows.graph.node if "layers." in "".join(node.input)}.isdisjoint({"MatMul"})
    for count in (1, 7, 40):
        expected, found = logits(exact, count), logits(rows, count)
        assert 0 < distance(found, expected) < FAR


def test_projections_side_by_side_are_taken_apart_with_the_same_numbers(llama: Path, fp32: Path) -> None:
    apart, fused = build_fp32(open_checkpoint(llama), CONTEXT), load_graph(fp32)
    for model in (apart, fused):
        quantise_rows(model)
    kinds = [sorted(node.op_type for node in model.graph.node) for model in (apart, fused)]
    assert kinds[0] == kinds[1]
    assert "Split" not in kinds[1]
    layers = graph_shape(fused).num_layers
    assert kinds[1].count("QuantizeLinear") == 4 * layers, "gate and up share the quantised input"
    assert kinds[1].count("MatMulIntegerToFloat") == 5 * layers
    assert sum(node.name.endswith("_row_scale") for node in fused.graph.node) == 4 * layers, "up's is handed on"
    assert sum(node.name.endswith(".handed_on") for node in fused.graph.node) == layers
    assert np.array_equal(logits(apart), logits(fused))


def test_split_of_a_product_that_others_read_too_is_left_alone(fp32: Path) -> None:
    model = load_graph(fp32)
    split = next(node for node in model.graph.node if node.op_type == "Split")
    model.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))
    model.graph.node.append(helper.make_node("Identity", [split.input[0]], ["seen"], name="seen"))
    expected = logits(model)
    quantise_rows(model)
    assert [node.op_type for node in model.graph.node].count("Split") == 1
    assert distance(logits(model), expected) < FAR


def agreement(fp32: Path, model: ModelProto, spec: ModelSpec, folder: Path) -> Agreement:
    save_graph(model, folder / "int8.onnx")
    rng = np.random.default_rng(1)
    texts = [(rng.integers(0, VOCAB, 12).tolist(), rng.integers(0, VOCAB, 8).tolist()) for _ in range(3)]
    return between(StepModel(fp32, spec), StepModel(folder / "int8.onnx", spec), texts)


@pytest.mark.parametrize("method", METHODS)
def test_embedding_and_head_are_int4_as_ever(method: Method, llama: Path, fp32: Path, tmp_path: Path) -> None:
    model, plain = int8(fp32, method), quantize_int4(load_graph(fp32), QuantSettings(method, 32))

    def of_the_table(graph: ModelProto) -> dict[str, bytes]:
        return {t.name: t.raw_data for t in graph.graph.initializer if "embed" in t.name}

    assert of_the_table(model) == of_the_table(plain)
    spec = fp32_spec(open_checkpoint(llama), load_graph(fp32), CONTEXT)
    rows, four = (agreement(fp32, graph, spec, tmp_path) for graph in (model, plain))
    assert rows.positions == 27
    assert rows.mean_kl < 0.8 * four.mean_kl, "what is left is the table's"


@pytest.mark.parametrize("tied", [True, False])
def test_calibrated_head_is_calibrated_on_what_eight_bits_give_it(tmp_path: Path, *, tied: bool) -> None:
    synthesise("smollm2-135m", tmp_path / "checkpoint", layers=1, **TINY, tie_word_embeddings=tied)
    model = build_fp32(open_checkpoint(tmp_path / "checkpoint"), CONTEXT)
    expected = logits(model)
    quantise_rows(model)
    texts = [np.random.default_rng(seed).integers(0, VOCAB, 20).tolist() for seed in range(8)]
    model = quantize_int4(model, QuantSettings("gptq", 32), calibration_ids=texts)
    assert [node.op_type for node in model.graph.node].count("MatMulNBits") == 1
    assert distance(logits(model), expected) < 2 * FAR, "four bits of the table are coarser than eight of the rest"


def test_scales_of_outputs_stay_wide_and_there_is_nothing_to_fold_at_a_start(fp32: Path) -> None:
    model = int8(fp32)
    expected = logits(model)
    shared = {node.input[2] for node in model.graph.node if node.op_type == "MatMulNBits"}
    assert compact_scales(model) > 0, "the scales that table and head share"
    assert np.array_equal(logits(model), expected)
    stored = {tensor.name for tensor in model.graph.initializer}
    folded = [node.input[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored]
    assert folded == [f"{name}.f16" for name in shared]


@pytest.mark.parametrize("coarse", [False, True])
def test_head_is_pruned_and_split_as_ever(fp32: Path, *, coarse: bool) -> None:
    expected = logits(int8(fp32), ids=KEPT.tolist())[KEPT]
    model = int8(fp32)
    (coarsen_table if coarse else prune_head)(model, KEPT)
    compact_scales(model)
    np.testing.assert_allclose(logits(model, ids=KEPT.tolist()), expected, rtol=1e-5, atol=1e-5)
    decoder, head = split_head(model)
    hidden = logits(decoder, ids=KEPT.tolist())[None, None]
    apart = session(head).run(["logits"], {HIDDEN: hidden})[0][0, 0]
    np.testing.assert_allclose(apart, expected, rtol=1e-5, atol=1e-5)


def test_text_in_one_pass_is_the_text_token_by_token(fp32: Path) -> None:
    model = int8(fp32)
    text = np.random.default_rng(4).integers(0, VOCAB, 30).tolist()
    whole, steps = Rows(model, rows=1, capacity=48), Rows(model, rows=1, capacity=48)
    (expected,) = whole.step([text])
    found = [steps.step([[token]])[0] for token in text][-1]
    # Attention sums floats in another order: an activation may round to the neighbouring code.
    assert np.abs(found - expected).max() < NEAR * np.abs(expected).max()


def test_rows_of_a_ragged_batch_continue_as_if_alone(fp32: Path) -> None:
    model, plain = int8(fp32), int8(fp32)
    add_ragged(model)
    rng = np.random.default_rng(5)
    passes = [[rng.integers(0, VOCAB, count).tolist() for count in counts] for counts in ((7, 20, 13), (5, 1, 9))]
    batch = Rows(model, rows=3, capacity=48)
    together = [batch.step(texts) for texts in passes]
    for row in range(3):
        alone = Rows(plain, rows=1, capacity=48)
        for texts, found in zip(passes, together, strict=True):
            (expected,) = alone.step([texts[row]])
            assert np.abs(found[row] - expected).max() < NEAR * np.abs(expected).max()


def test_int8_caches_stay_close(fp32: Path) -> None:
    rng = np.random.default_rng(8)
    texts = [rng.integers(0, VOCAB, 40).tolist() for _ in range(6)]
    model = int8(fp32)
    quantise_kv(model, measure_kv_scales(model, texts))
    small, exact = Rows(model, rows=1, capacity=48), Rows(int8(fp32), rows=1, capacity=48)
    (found,), (expected,) = small.step([texts[0]]), exact.step([texts[0]])
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_saturation_free_weights_are_what_the_runtime_multiplies() -> None:
    """The smallest and the largest activation against every weight."""
    stored = round_columns(torch.from_numpy(weight()))
    codes = np.array([[255] * INPUTS, [1] * INPUTS], np.uint8)  # [rows, inputs]
    product = _integer_product(stored.codes).run(None, {"codes": codes})[0]
    assert np.array_equal(product, (codes.astype(np.int64) - 128) @ stored.codes.astype(np.int64))


def _integer_product(codes: npt.NDArray[np.int8]) -> Any:
    tensors: dict[str, npt.NDArray[Any]] = {
        "weight": codes,
        "one": np.array(1, np.float32),
        "middle": np.array(128, np.uint8),
        "zero": np.array(0, np.int8),
    }
    node = helper.make_node(
        "MatMulIntegerToFloat",
        ["codes", "weight", "one", "one", "middle", "zero"],
        ["product"],
        domain="com.microsoft",
    )
    inputs = helper.make_tensor_value_info("codes", TensorProto.UINT8, ["rows", codes.shape[0]])
    outputs = helper.make_tensor_value_info("product", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", [inputs], [outputs], stored)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
