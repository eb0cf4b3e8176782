"""Grids, packing, GPTQ and compact scales, each against what ONNX Runtime computes or what must not get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from edge_agent.errors import EdgeError, PermanentError
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.graphs.graph import build_fp32
from export.proof.parity import Agreement
from export.quantisation.block_weights import (
    BlockWeights,
    GridRule,
    fits_float16,
    pack,
    round_to_grid,
    storable,
    unpack,
)
from export.quantisation.compact import compact_scales
from export.quantisation.gptq import gptq_round, hessians
from export.quantisation.grids import extremes, half_quadratic, least_squares
from export.quantisation.matrices import initializer, read_matrix, stored_matrices
from export.quantisation.probe import Probe, common_prefix
from export.quantisation.quantize import METHODS, Method, QuantSettings, quantise_matrix, quantize_int4
from export.quantisation.scoring import Scorer
from export.quantisation.sensitivity import Sensitivity, choose_int8, measure_sensitivity
from tests.export.conftest import TINY

CONTEXT = 128


def random_texts(count: int, vocabulary: int = 1024, seed: int = 3) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, vocabulary, 6).tolist()
    return [
        (prefix + rng.integers(0, vocabulary, 9).tolist(), rng.integers(0, vocabulary, 5).tolist())
        for _ in range(count)
    ]


TEXTS = random_texts(6)
WHOLE_TEXTS = [[*prompt, *answer] for prompt, answer in random_texts(24, seed=4)]


@pytest.fixture(scope="module")
def fp32(llama: Path) -> bytes:
    """The fused graph of the tiny model; quantising consumes a graph, so each test parses its own."""
    return bytes(build_fp32(open_checkpoint(llama), CONTEXT).SerializeToString())


@pytest.fixture(scope="module")
def scorer(fp32: bytes) -> Scorer:
    return Scorer(Probe(ModelProto.FromString(fp32)), TEXTS, "a test")


def quantised(fp32: bytes, settings: QuantSettings) -> ModelProto:
    return quantize_int4(ModelProto.FromString(fp32), settings, calibration_ids=WHOLE_TEXTS)


def agreement(scorer: Scorer, model: ModelProto) -> Agreement:
    return scorer.agreement(Probe(model, exchangeable=False))


def matrix(rows: int = 96, columns: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def product_of(weights: BlockWeights, inputs: np.ndarray) -> Any:
    """What ONNX Runtime multiplies with, in its most exact arithmetic."""
    arrays: dict[str, Any] = {"packed": weights.packed, "scales": weights.scales, "zeros": weights.packed_zero_points()}
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *(tensor.name for tensor in stored)],
        ["y"],
        domain="com.microsoft",
        K=weights.columns,
        N=weights.rows,
        bits=weights.bits,
        block_size=weights.block_size,
        accuracy_level=0,
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(inputs.shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], stored), opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": inputs})[
        0
    ]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_loses_no_code_when_the_last_byte_is_not_full(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 5)).astype(np.uint8)
    assert np.array_equal(unpack(pack(codes, bits), bits)[:, :5], codes)


@pytest.mark.parametrize(
    ("rule", "bits", "symmetric"),
    [
        (extremes, 2, False),
        (extremes, 4, True),
        (extremes, 4, False),
        (extremes, 8, True),
        (least_squares, 4, True),
        (least_squares, 4, False),
        (half_quadratic, 4, False),
    ],
)
@pytest.mark.parametrize("columns", [160, 150])
def test_kernel_reads_the_same_weights_as_we_packed(
    rule: GridRule, bits: int, columns: int, *, symmetric: bool
) -> None:
    # 160 columns are five blocks, an odd number; 150 leave the last block ragged.
    weights = round_to_grid(matrix(columns=columns), rule, bits, 32, symmetric=symmetric)
    inputs = np.random.default_rng(1).standard_normal((3, columns), np.float32)
    assert np.allclose(product_of(weights, inputs), inputs @ weights.dequantised().T, atol=2e-5)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_round_to_nearest_agrees_with_the_runtime_s_own_quantiser(block_size: int) -> None:
    weight = matrix(columns=256)
    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.numpy().T))
    ours = round_to_grid(weight, extremes, 4, block_size, symmetric=True)
    assert np.allclose(ours.scales, scales, rtol=2**-10)
    # Scales rounded to float16 turn a weight that lies almost between two codes, and no other.
    assert (unpack(ours.packed, 4) != unpack(packed, 4)).mean() < 0.005


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_grid_is_never_worse_than_the_extremes(*, symmetric: bool) -> None:
    weight = matrix()
    errors = {
        rule.__name__: float(
            np.square(round_to_grid(weight, rule, 4, 32, symmetric=symmetric).dequantised() - weight.numpy()).mean()
        )
        for rule in (extremes, least_squares)
    }
    assert errors["least_squares"] < 0.95 * errors["extremes"]


@pytest.mark.parametrize("rule", [extremes, least_squares, half_quadratic])
def test_block_of_equal_weights_is_kept_and_no_scale_is_zero(rule: GridRule) -> None:
    weight = torch.zeros(2, 64)
    weight[0, 32:] = 0.25
    weights = round_to_grid(weight, rule, 4, 32, symmetric=False)
    assert np.isfinite(weights.dequantised()).all()
    assert np.allclose(weights.dequantised(), weight, atol=1e-3)


def test_float_zeros_are_not_cut_to_codes_where_a_chunk_has_whole_ones() -> None:
    weight = torch.cat([torch.zeros(8192, 64), matrix(64, 64)])  # the first chunks' zeros are whole
    weights = round_to_grid(weight, half_quadratic, 4, 32, symmetric=False)
    assert weights.zero_points is not None
    assert weights.zero_points.dtype == np.float32
    assert np.abs(weights.dequantised()[-64:] - weight[-64:].numpy()).max() < 0.02


def test_scales_that_float16_cannot_hold_are_not_rounded() -> None:
    scales = torch.tensor([0.01, 1e-7, 3e-9, 7e4])
    rounded = storable(scales)
    assert rounded[0] != scales[0]
    assert torch.equal(rounded[1:], scales[1:])


@pytest.mark.parametrize(
    ("scales", "fits"),
    [
        ([0.01, 0.02], True),
        ([0.01, 0.02, 1e-9], True),  # an unused row: nothing beside the others' steps
        ([1e-8, 2e-8], False),  # a whole matrix below float16's range
        ([0.01, 7e4], False),
        ([0.01, float("nan")], False),
    ],
)
def test_scales_stay_float32_where_float16_would_lose_them(scales: list[float], *, fits: bool) -> None:
    assert fits_float16(np.array([scales], np.float32)) is fits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "block_size"), [(256, 32), (256, 128), (300, 64)])
def test_calibrated_rounding_errs_less_on_inputs_that_vary_together(
    columns: int, block_size: int, *, symmetric: bool
) -> None:
    weight = matrix(columns=columns)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    hessian = inputs.t() @ inputs / 400
    plain = round_to_grid(weight, least_squares, 4, block_size, symmetric=symmetric)
    calibrated = gptq_round(weight, hessian, least_squares, 4, block_size, symmetric=symmetric)
    errors = [
        float(np.square(inputs.numpy() @ (w.dequantised() - weight.numpy()).T).mean()) for w in (plain, calibrated)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_never_vary_are_damped_and_noise_is_refused() -> None:
    weight = matrix(8, 64)
    silent = gptq_round(weight, torch.zeros(64, 64), least_squares, 4, 32, symmetric=True)
    assert np.array_equal(silent.packed, round_to_grid(weight, least_squares, 4, 32, symmetric=True).packed)
    with pytest.raises(PermanentError) as caught:
        gptq_round(weight, torch.full((64, 64), torch.nan), least_squares, 4, 32, symmetric=True)
    assert caught.value.code == "export.quantize_failed"


def test_hessians_gathered_in_turns_equal_those_of_one_turn(fp32: bytes) -> None:
    model = ModelProto.FromString(fp32)
    whole = next(hessians(model, WHOLE_TEXTS))
    turns = list(hessians(model, WHOLE_TEXTS, budget_bytes=4 * 128 * 128))
    assert len(turns) > 4
    assert {m.multiplied for m in stored_matrices(model)} == set(whole) == {name for turn in turns for name in turn}
    for turn in turns:
        for name, hessian in turn.items():
            assert torch.allclose(hessian, whole[name], rtol=1e-4, atol=1e-5)


def test_first_hessian_is_that_of_the_normalised_embedding(fp32: bytes, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = ModelProto.FromString(fp32)
    text = WHOLE_TEXTS[0]
    found = next(hessians(model, [text]))[stored_matrices(model)[0].multiplied]
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).model
    with torch.inference_mode():
        inputs = original.layers[0].input_layernorm(original.embed_tokens(torch.tensor(text)))  # [tokens, hidden]
    assert torch.allclose(found, inputs.t() @ inputs / len(text), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [*METHODS, "gptq"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_every_method_and_block_size_keeps_the_model(
    scorer: Scorer, fp32: bytes, method: Method, block_size: int
) -> None:
    # Wide random weights are the worst case for four bits; a wrong scale or a swapped nibble gives a KL above 5.
    assert agreement(scorer, quantised(fp32, QuantSettings(method, block_size))).mean_kl < 2.0


def test_method_on_the_task_s_texts_is_refused_without_texts(fp32: bytes) -> None:
    with pytest.raises(EdgeError) as caught:
        quantize_int4(ModelProto.FromString(fp32), QuantSettings("gptq"))
    assert caught.value.code == "export.calibration_missing"


def test_symmetric_hqq_is_refused() -> None:
    with pytest.raises(EdgeError) as caught:
        QuantSettings("hqq", symmetric=True)
    assert caught.value.code == "export.method_unsuitable"


def test_untied_head_and_table_are_quantised_apart(tmp_path: Path) -> None:
    synthesise("smollm2-135m", tmp_path / "untied", layers=1, **TINY, tie_word_embeddings=False)
    model = build_fp32(open_checkpoint(tmp_path / "untied"), CONTEXT)
    scorer = Scorer(Probe(model), TEXTS, "a test")
    for method in (*METHODS, "gptq"):
        copy = ModelProto.FromString(model.SerializeToString())
        small = quantize_int4(copy, QuantSettings(method), calibration_ids=WHOLE_TEXTS)
        assert agreement(scorer, small).mean_kl < 1.5


def test_eight_bits_for_a_matrix_that_is_not_there_are_refused(fp32: bytes) -> None:
    with pytest.raises(EdgeError) as caught:
        quantised(fp32, QuantSettings("rtn", int8_nodes=("nothing",)))
    assert caught.value.code == "export.node_unknown"


@pytest.mark.parametrize("method", ["rtn", "k_quant"])
def test_compact_scales_change_no_logit_and_leave_no_cast_to_run(fp32: bytes, method: Method, tmp_path: Path) -> None:
    model = quantised(fp32, QuantSettings(method))
    before = Probe(model, exchangeable=False).run(WHOLE_TEXTS[0], Probe(model, exchangeable=False).start(), [0, 5])
    wide = model.ByteSize()
    saved = compact_scales(model)
    assert saved > 0
    assert model.ByteSize() < wide - 0.8 * saved
    probe = Probe(model, exchangeable=False)
    assert np.array_equal(probe.run(WHOLE_TEXTS[0], probe.start(), [0, 5])["logits"], before["logits"])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = [n.name for n in ModelProto.FromString((tmp_path / "optimised.onnx").read_bytes()).graph.node]
    assert not [name for name in left if name.endswith(".wide") or name.startswith("embedding.scales")]
    assert not [name for name in left if name.startswith("embedding.") and name != "embedding.rows"]


def test_layer_that_four_bits_hurt_is_found_and_gets_eight(fp32: bytes) -> None:
    model = ModelProto.FromString(fp32)
    settings = QuantSettings("rtn")
    victim, *others = sorted(stored_matrices(model), key=lambda m: "layers.1.mlp.down_proj" not in m.weight)
    for other in others:  # on their grids already: rounding costs them nothing
        rounded = quantise_matrix(read_matrix(model, other), settings).dequantised()
        stored = initializer(model, other.weight)
        stored.CopyFrom(numpy_helper.from_array(rounded.T.copy() if other.transposed else rounded, stored.name))
    found = measure_sensitivity(model, TEXTS, settings)
    harmed = [entry for entry in found if entry.kl_nats > 1e-4]
    assert [entry.layer for entry in harmed] == ["layers.1.down_proj"]
    chosen = choose_int8(found, 1.0)
    assert victim.node in chosen
    reference = Scorer(Probe(model), TEXTS, "a test")
    without, kept = (
        agreement(reference, quantize_int4(ModelProto.FromString(model.SerializeToString()), wanted)).mean_kl
        for wanted in (settings, QuantSettings("rtn", int8_nodes=(victim.node,)))
    )
    assert kept < 0.5 * without


def test_budget_of_eight_bits_is_never_exceeded() -> None:
    found = [
        Sensitivity(f"layer {n}", (f"node {n}",), kl, size) for n, (kl, size) in enumerate([(9, 60), (5, 30), (3, 20)])
    ]
    assert choose_int8(found, 0.0) == ()
    assert choose_int8(found, 0.5) == ("node 1", "node 2")
    assert choose_int8(found, 1.0) == ("node 0", "node 1", "node 2")


def test_common_prefix_leaves_something_of_every_text() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2]]) == [1]
    assert common_prefix([[1]]) == []


def test_matrix_reads_the_same_from_either_orientation(fp32: bytes) -> None:
    model = ModelProto.FromString(fp32)
    for entry in stored_matrices(model):
        assert read_matrix(model, entry).shape == (entry.rows, entry.columns)
    assert stored_matrices(model)[-1].is_tied
