"""float16 activations: the same decisions, the same interface, and a refusal where float16 would overflow."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from edge_agent.contract.dsse import generate_key
from edge_agent.contract.manifest import MANIFEST_NAME, ModelSpec, read_manifest
from edge_agent.errors import EdgeError
from export.boards import load_boards
from export.build import Workplace, build
from export.bundle import list_files
from export.checkpoint.source import open_checkpoint
from export.graphs.graph import build_fp32, load_graph, save_graph
from export.graphs.half import HEADROOM, LARGEST_HALF, check_headroom, peak_activations, to_half
from export.graphs.int8_kv import measure_kv_scales, quantise_kv
from export.graphs.ragged import add_ragged
from export.graphs.split_head import split_head
from export.progress import LineProgress, QuietProgress
from export.proof.evidence import check_agreement, verification
from export.proof.greedy import StepModel
from export.proof.testimony import prove_golden, prove_on_cpu, this_interpreter
from export.quantisation.quantize import QuantSettings, quantize_int4
from export.reference.bundle_build import reference_request
from export.request import GraphOptions, Identity
from export.stages.fuse import fp32_spec
from export.stages.witnesses import Elsewhere, gather_evidence
from tests.export.conftest import TASK, Build
from tests.export.test_parity import TESTED, make_checkpoint

JETSON = load_boards()["cuda-jetson"]
CONTEXT = 128
IDS = [3, 141, 59, 265, 358, 979, 32, 384]


def int4_graph(checkpoint: Path) -> tuple[ModelProto, ModelSpec]:
    opened = open_checkpoint(checkpoint)
    model = build_fp32(opened, CONTEXT)
    spec = fp32_spec(opened, model, CONTEXT)
    return quantize_int4(model, QuantSettings("rtn", 32)), spec


def last_logits(model: ModelProto, spec: ModelSpec, folder: Path) -> np.ndarray:
    """Logits after `IDS`, the last of which is fed on its own, after the caches of the others."""
    save_graph(model, folder / "decoder.onnx")
    steps = StepModel(folder / "decoder.onnx", spec)
    _, past = steps.step(IDS[:-1], steps.start())
    return steps.step(IDS[-1:], past)[0]


def halved(spec: ModelSpec) -> ModelSpec:
    return replace(spec, kv_dtype="float16")


@pytest.fixture
def jetson_bundle(tmp_path: Path) -> Path:
    """The reference bundle with float16 activations, for a Jetson."""
    bundle = tmp_path / "jetson"
    request = replace(reference_request(), graph=GraphOptions(together=False))
    build(request, bundle, generate_key(), Workplace(LineProgress()))
    manifest, _ = read_manifest(bundle)
    model = load_graph(bundle / manifest.model.decoder)
    to_half(model)
    save_graph(model, bundle / manifest.model.decoder)
    changed = replace(manifest, target="cuda-jetson", model=halved(manifest.model), files=list_files(bundle))
    (bundle / MANIFEST_NAME).write_bytes(changed.to_bytes())
    return bundle


def test_half_graph_decides_as_the_original_but_a_cpu_proves_nothing_for_a_jetson(jetson_bundle: Path) -> None:
    run = prove_on_cpu(jetson_bundle)
    assert (run.target, run.provider, run.events, run.same) == ("cuda-jetson", "CPUExecutionProvider", 24, 24)
    check_agreement(JETSON, run)
    assert verification(JETSON, run) == JETSON.verification == "unverified"


def test_half_graph_is_executed_where_a_gpu_is_present_and_only_there(jetson_bundle: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        run = prove_golden(this_interpreter(), jetson_bundle)
        assert run.provider == "CUDAExecutionProvider"
        check_agreement(JETSON, run)
        assert verification(JETSON, run) == ("executed" if run.machine in JETSON.machines else "unverified")
    else:
        with pytest.raises(EdgeError, match=r"^bundle\.unsupported.* cuda-jetson"):
            prove_golden(this_interpreter(), jetson_bundle)


def test_build_without_a_gpu_lets_the_cpu_check_the_graph_and_says_no_more(jetson_bundle: Path) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        (run,) = gather_evidence(JETSON, jetson_bundle, Elsewhere(), QuietProgress())
        assert (run.provider, run.events, run.same) == ("CPUExecutionProvider", 24, 24)
        assert verification(JETSON, run) == "unverified"


@pytest.mark.parametrize("head", ["attached", "split"])
def test_built_bundle_has_half_caches_and_admits_that_it_never_ran(
    head: Literal["attached", "split"], make_bundle: Build, tmp_path: Path
) -> None:
    # Without golden examples: those of the fixture are answers of a model of noise, which float16 may tip.
    (tmp_path / "task.yaml").write_text(TASK)
    identity, options = Identity("tiny", "1.0.0", "cuda-jetson"), GraphOptions(head=head)
    built = make_bundle(tmp_path / "bundle", identity=identity, tasks=(tmp_path,), graph=options)
    assert (built.manifest.target, built.manifest.model.kv_dtype) == ("cuda-jetson", "float16")
    assert built.report["verification"] == "unverified"


@pytest.mark.parametrize(("like", "changes"), TESTED)
def test_every_architecture_keeps_its_top_token(like: str, changes: dict[str, Any], tmp_path: Path) -> None:
    # Not INT4: its int8 activations, rounded anew in every operator, would hide what float16 does.
    opened = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", like, changes))
    model = build_fp32(opened, CONTEXT)
    spec = fp32_spec(opened, model, CONTEXT)
    full = last_logits(model, spec, tmp_path)
    to_half(model)
    onnx.checker.check_model(model, full_check=True)
    half = last_logits(model, halved(spec), tmp_path)
    assert half.dtype == np.float32
    assert int(half.argmax()) == int(full.argmax())
    # 11 bits of mantissa, a few dozen operations deep
    assert float(np.abs(half - full).max()) < 0.01 * float(np.abs(full).max())


def test_no_float32_is_left_but_at_the_border(llama: Path) -> None:
    model, _ = int4_graph(llama)
    to_half(model)
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in model.graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    assert {types[name] for name in types if name.startswith(("past_key_values.", "present."))} == {TensorProto.FLOAT16}
    assert types["logits"] == TensorProto.FLOAT
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert [node.output[0] for node in casts if node.attribute[0].i == TensorProto.FLOAT] == ["logits"]


def test_head_of_its_own_takes_and_gives_float32(llama: Path, tmp_path: Path) -> None:
    model, spec = int4_graph(llama)
    whole = ModelProto()
    whole.CopyFrom(model)
    decoder, head = split_head(model)
    for graph in (whole, decoder, head):
        to_half(graph)
    save_graph(head, tmp_path / "head.onnx")
    apart = last_logits(decoder, replace(halved(spec), head="head.onnx"), tmp_path)
    together = last_logits(whole, halved(spec), tmp_path)
    assert np.array_equal(apart, together)


def test_activation_near_the_end_of_float16_is_refused_by_name(llama: Path) -> None:
    model, _ = int4_graph(llama)
    before = peak_activations(model, [IDS])
    assert check_headroom(before) == max(before.values()) < LARGEST_HALF / HEADROOM
    loud = "model.layers.1.post_attention_layernorm.weight"
    for tensor in model.graph.initializer:
        if tensor.name == loud:
            weight = numpy_helper.to_array(tensor) * np.float32(LARGEST_HALF)
            tensor.CopyFrom(numpy_helper.from_array(weight, loud))
    with pytest.raises(EdgeError, match=r"^export\.half_overflow: .*layers\.1\.mlp.* reaches ") as caught:
        check_headroom(peak_activations(model, [IDS]))
    assert caught.value.context["peak"] > LARGEST_HALF


def test_measured_peaks_are_those_of_the_very_tensors(llama: Path, tmp_path: Path) -> None:
    model, spec = int4_graph(llama)
    peaks = peak_activations(model, [IDS, IDS[:3]])
    logits = [last_logits(model, spec, tmp_path)]
    save_graph(model, tmp_path / "decoder.onnx")
    steps = StepModel(tmp_path / "decoder.onnx", spec)
    short, past = steps.step(IDS[:3], steps.start())
    assert peaks["logits"] == pytest.approx(max(float(np.abs(one).max()) for one in [*logits, short]), rel=1e-3)
    assert peaks["present.0.value"] >= float(np.abs(past["past_key_values.0.value"]).max())


@pytest.mark.parametrize("peak", [math.nan, math.inf, LARGEST_HALF, LARGEST_HALF / HEADROOM * 1.01])
def test_peak_without_headroom_is_refused(peak: float) -> None:
    with pytest.raises(EdgeError, match=r"^export\.half_overflow: b reaches"):
        check_headroom({"a": 1.0, "b": peak, "c": 2.0})


def test_weight_that_float16_cannot_hold_is_refused(llama: Path) -> None:
    model = build_fp32(open_checkpoint(llama), CONTEXT)
    norm = next(tensor for tensor in model.graph.initializer if tensor.name == "model.norm.weight")
    norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * np.float32(1e5), norm.name))
    with pytest.raises(EdgeError, match=r"^export\.half_overflow: model\.norm\.weight holds 100000"):
        to_half(model)


def test_what_only_the_cpu_has_is_refused(llama: Path) -> None:
    ragged = build_fp32(open_checkpoint(llama), CONTEXT)
    add_ragged(ragged)
    eight_bits = build_fp32(open_checkpoint(llama), CONTEXT)
    quantise_kv(eight_bits, measure_kv_scales(eight_bits, [IDS]))
    for model in (ragged, eight_bits):
        with pytest.raises(EdgeError, match=r"^export\.half_unsuitable"):
            peak_activations(model, [IDS])
        with pytest.raises(EdgeError, match=r"^export\.half_unsuitable"):
            to_half(model)
