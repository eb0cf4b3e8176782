"""The graph is the model, in every architecture that is accepted; where it is not, the layer is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper

from edge_agent.contract.manifest import ModelSpec
from edge_agent.errors import EdgeError
from export.checkpoint.source import ARCHITECTURES, open_checkpoint
from export.checkpoint.synth import SHAPES, synthesise
from export.graphs.fusions import fuse_projections
from export.graphs.graph import build_fp32, save_graph
from export.proof.greedy import Floats, StepModel
from export.proof.parity import TOLERANCE, Parity, against_recording, against_transformers, between, prove_parity
from export.proof.parting import Parting, find_parting
from export.proof.recording import Recording, observe
from export.quantisation.quantize import QuantSettings, quantize_int4
from export.stages.fuse import fp32_spec
from tests.export.conftest import TINY, change_weights

CONTEXT = 128

# The shape that is made tiny, and what is changed in it.
TESTED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("smollm2-135m", {}),
    ("smollm2-135m", {"tie_word_embeddings": False}),
    ("qwen2.5-0.5b", {}),
    ("qwen3-0.6b", {}),
    # Six layers hold five local and one global; the window is shorter than the text.
    ("gemma3-270m", {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 32, "rope_theta": 1e6}),
    ("ernie4.5-0.3b", {}),
    # Turning a quarter of a head of 64 is the narrowest that the runtime's attention can do.
    ("pythia-160m", {"num_attention_heads": 2, "head_dim": 64}),
    ("smollm2-135m", {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None}),
    ("smollm2-135m", {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 8}),
    # Published from 1.2 B parameters on: for --allow-large.
    ("smollm2-135m", {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("smollm2-135m", {"model_type": "gemma"}),
    ("smollm2-135m", {"model_type": "starcoder2", "sliding_window": 8}),
)


def test_every_accepted_architecture_is_held_against_transformers() -> None:
    tested = {changes.get("model_type", SHAPES[like]["model_type"]) for like, changes in TESTED}
    assert tested == ARCHITECTURES


def make_checkpoint(folder: Path, like: str, changes: dict[str, Any]) -> Path:
    synthesise(like, folder, **{"num_hidden_layers": 2, **TINY, **changes})

    def roughen(weights: dict[str, torch.Tensor]) -> None:
        # Fresh norms are all ones and fresh biases all zeros: a graph that mixes them up would not be noticed.
        generator = torch.Generator().manual_seed(1)
        for tensor in weights.values():
            if tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))

    change_weights(folder, roughen)
    return folder


def make_graph(checkpoint: Path, graph: Path, change: Callable[[ModelProto], None] | None = None) -> ModelSpec:
    opened = open_checkpoint(checkpoint)
    model = build_fp32(opened, CONTEXT)
    spec = fp32_spec(opened, model, CONTEXT)
    if change:
        change(model)
    save_graph(model, graph)
    return spec


@pytest.mark.parametrize(("like", "changes"), TESTED)
def test_fp32_graph_equals_transformers_over_prefill_and_64_steps(
    like: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", like, changes)
    recording = observe(open_checkpoint(checkpoint))
    spec = make_graph(checkpoint, tmp_path / "fp32.onnx")
    parity = prove_parity(recording, tmp_path / "fp32.onnx", spec)
    parity.require()
    assert parity.positions == 65
    assert parity.same_tokens
    assert parity.max_abs_diff <= TOLERANCE
    # The other half of the promise: what is right everywhere parts nowhere.
    assert find_parting(tmp_path / "fp32.onnx", recording).part == "cache"


@pytest.mark.parametrize(("like", "changes"), TESTED)
def test_every_accepted_architecture_can_be_quantised(like: str, changes: dict[str, Any], tmp_path: Path) -> None:
    opened = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", like, changes))
    model = build_fp32(opened, CONTEXT)
    spec = fp32_spec(opened, model, CONTEXT)
    save_graph(model, tmp_path / "fp32.onnx")
    save_graph(quantize_int4(model, QuantSettings("rtn", 32)), tmp_path / "int4.onnx")
    rng = np.random.default_rng(1)
    texts = [(rng.integers(0, 1024, 12).tolist(), rng.integers(0, 1024, 8).tolist()) for _ in range(2)]
    agreement = between(StepModel(tmp_path / "fp32.onnx", spec), StepModel(tmp_path / "int4.onnx", spec), texts)
    # Wide random weights are the worst case for four bits; a wrong scale or a swapped nibble gives a KL above 5.
    assert agreement.mean_kl < 2.5


class Silent:
    """A graph that answers the same whatever it is asked."""

    def __init__(self, logit: float) -> None:
        self._logits = np.full(TINY["vocab_size"], logit, np.float32)

    def start(self) -> dict[str, Floats]:
        return {}

    def step(self, ids: list[int], past: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        return self._logits, past


@pytest.mark.parametrize("logit", [0.0, float("nan"), float("inf")])
def test_graph_that_answers_nonsense_is_not_taken_for_the_model(logit: float, llama: Path) -> None:
    assert not against_transformers(open_checkpoint(llama), Silent(logit)).holds


# --- where a graph parts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that a layer can be named among others."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "checkpoint", "smollm2-135m", {"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def recording(deep: Path) -> Recording:
    return observe(open_checkpoint(deep))


def scale(name: str, factor: float, entries: int | None = None) -> Callable[[ModelProto], None]:
    """Damage: multiply ``entries`` values of a weight (all of them if None)."""

    def change(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.startswith(name))
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[:entries] *= factor
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return change


def without_rotary(layer: int) -> Callable[[ModelProto], None]:
    """Damage: one layer forgets where its tokens stand."""

    def change(model: ModelProto) -> None:
        attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][layer]
        next(a for a in attention.attribute if a.name == "do_rotary").i = 0

    return change


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (scale("model.layers.1.mlp.down_proj", 1.05), "layer 1 (mlp)"),
        (scale("model.layers.3.mlp.up_proj", 0.9), "layer 3 (mlp)"),
        # One weight of 24,576: what a wrong index or a flipped bit would do.
        (scale("model.layers.2.mlp.down_proj", 8.0, entries=1), "layer 2 (mlp)"),
        (scale("model.layers.2.self_attn.o_proj", 1.05), "layer 2 (self_attn)"),
        (scale("model.layers.0.input_layernorm", 1.01), "layer 0 (self_attn)"),
        (scale("model.layers.2.post_attention_layernorm", 1.01), "layer 2 (mlp)"),
        (without_rotary(0), "layer 0 (self_attn)"),
        (without_rotary(3), "layer 3 (self_attn)"),
        (scale("model.norm", 1.01), "after the last layer"),
    ],
)
def test_damaged_layer_is_named(
    damage: Callable[[ModelProto], None], named: str, deep: Path, recording: Recording, tmp_path: Path
) -> None:
    spec = make_graph(deep, tmp_path / "fp32.onnx", damage)
    with pytest.raises(EdgeError) as caught:
        prove_parity(recording, tmp_path / "fp32.onnx", spec).require()
    assert caught.value.code == "export.parity_failed"
    assert named in caught.value.detail
    assert named in caught.value.context["parts_at"]


def test_damaged_embedding_is_named(deep: Path, recording: Recording, tmp_path: Path) -> None:
    make_graph(deep, tmp_path / "fp32.onnx", scale("model.embed_tokens.weight", 1.01))
    assert find_parting(tmp_path / "fp32.onnx", recording).part == "embedding"


def test_layer_that_answers_nan_is_named(deep: Path, recording: Recording, tmp_path: Path) -> None:
    make_graph(deep, tmp_path / "fp32.onnx", scale("model.layers.1.self_attn.o_proj", math.nan))
    assert str(find_parting(tmp_path / "fp32.onnx", recording)) == "at layer 1 (self_attn)"


def test_layer_is_named_when_the_weights_lie_beside_the_graph(deep: Path, recording: Recording, tmp_path: Path) -> None:
    model = build_fp32(open_checkpoint(deep), CONTEXT)
    scale("model.layers.1.mlp.down_proj", 1.05)(model)
    assert len(save_graph(model, tmp_path / "fp32.onnx", external_from_bytes=0)) == 2
    before = (tmp_path / "fp32.onnx").read_bytes()
    assert find_parting(tmp_path / "fp32.onnx", recording).layer == 1
    assert (tmp_path / "fp32.onnx").read_bytes() == before


def test_layer_is_named_in_a_graph_with_fused_projections(deep: Path, recording: Recording, tmp_path: Path) -> None:
    def change(model: ModelProto) -> None:
        scale("model.layers.2.mlp.gate_proj", 1.05)(model)
        assert fuse_projections(model) == 4

    make_graph(deep, tmp_path / "fp32.onnx", change)
    assert str(find_parting(tmp_path / "fp32.onnx", recording)) == "at layer 2 (mlp)"


def test_layer_of_a_parallel_block_is_named_as_a_whole(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "pythia-160m", {"num_attention_heads": 2, "head_dim": 64})
    make_graph(checkpoint, tmp_path / "fp32.onnx", scale("model.layers.1.mlp.down_proj", 1.05))
    parting = find_parting(tmp_path / "fp32.onnx", observe(open_checkpoint(checkpoint)))
    assert str(parting) == "at layer 1 (layer)"


def test_damage_between_norms_of_gemma_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", *TESTED[4])
    make_graph(checkpoint, tmp_path / "fp32.onnx", scale("model.layers.4.post_feedforward_layernorm", 1.05))
    parting = find_parting(tmp_path / "fp32.onnx", observe(open_checkpoint(checkpoint)))
    assert str(parting) == "at layer 4 (mlp)"


class Forgetful:
    """A graph that loses its caches after the prefill."""

    def __init__(self, model: StepModel) -> None:
        self._model = model

    def start(self) -> dict[str, Floats]:
        return self._model.start()

    def step(self, ids: list[int], past: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        return self._model.step(ids, self._model.start())


def test_lost_cache_is_noticed(deep: Path, recording: Recording, tmp_path: Path) -> None:
    spec = make_graph(deep, tmp_path / "fp32.onnx")
    parity = against_recording(recording, Forgetful(StepModel(tmp_path / "fp32.onnx", spec)))
    assert not parity.holds
    with pytest.raises(EdgeError) as caught:
        Parity(1.0, 1.0, same_tokens=False, positions=65, parting=Parting(None, "cache", 0.0)).require()
    assert "only in steps with a past" in caught.value.detail


def test_graph_whose_stream_cannot_be_followed_is_refused(deep: Path, recording: Recording, tmp_path: Path) -> None:
    def cut(model: ModelProto) -> None:
        addition = next(n for n in model.graph.node if n.op_type == "SkipSimplifiedLayerNormalization")
        addition.op_type = "SimplifiedLayerNormalization"

    make_graph(deep, tmp_path / "fp32.onnx", cut)
    with pytest.raises(EdgeError) as caught:
        find_parting(tmp_path / "fp32.onnx", recording)
    assert caught.value.code == "export.graph_unexpected"


# --- INT4 against fp32 ---------------------------------------------------------------------------------------------


class Told:
    """A graph whose logits, one row per step, are known."""

    def __init__(self, rows: list[list[float]]) -> None:
        self._rows = [np.array(row, np.float32) for row in rows]
        self._next = 0

    def start(self) -> dict[str, Floats]:
        return {}

    def step(self, ids: list[int], past: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        self._next += 1
        return self._rows[self._next - 1], past


def test_agreement_of_known_distributions() -> None:
    # After the prompt p is (1/2, 1/2) and q is (1/4, 3/4); after token 0 both are (3/4, 1/4).
    ln = math.log
    agreement = between(
        Told([[ln(0.5), ln(0.5)], [ln(0.75), ln(0.25)]]),
        Told([[ln(0.25), ln(0.75)], [ln(0.75), ln(0.25)]]),
        [([7], [0])],
    )
    assert agreement.as_dict() == {
        "positions": 2,
        "same_top1": 1,
        "top1_agreement": 0.5,
        "mean_kl_nats": round((0.5 * ln(0.5 / 0.25) + 0.5 * ln(0.5 / 0.75)) / 2, 4),
        "tokens": 1,
        "fp32_perplexity": 2.0,
        "perplexity": 4.0,
        "perplexity_ratio": 2.0,
    }


def test_equal_graphs_agree_wholly() -> None:
    rows = [[0.0, 1.0, 2.0], [3.0, 1.0, 0.5], [0.1, 0.2, 0.3]]
    agreement = between(Told(rows), Told(rows), [([1], [2, 0])])
    assert (agreement.same_top1, agreement.mean_kl, agreement.perplexity_ratio) == (3, 0.0, 1.0)
    assert agreement.tokens == 2


def test_texts_without_continuation_have_no_perplexity() -> None:
    agreement = between(Told([[0.0, 1.0]]), Told([[1.0, 0.0]]), [([1], [])])
    assert (agreement.tokens, agreement.perplexity_ratio) == (0, 1.0)
