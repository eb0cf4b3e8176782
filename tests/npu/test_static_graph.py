"""Static windows must be the model: against transformers, against the fused graph, and whatever was rewound before."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from transformers import AutoModelForCausalLM

from edge_agent.contract.manifest import MASKED_BIAS
from edge_agent.errors import EdgeError, PermanentError, RefusedError
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.static_session import StaticSession
from export.checkpoint.source import Checkpoint, open_checkpoint
from export.checkpoint.synth import synthesise
from export.graphs.graph import load_graph, save_graph
from export.npu.portable import export_portable
from export.npu.static_graph import StaticShape, build_static, build_windows
from export.npu.windows import StaticModel
from tests.export.conftest import TINY
from tests.npu.conftest import HELD_OUT, MakeBundle, engine_of

SHAPE = StaticShape(96, (16, 1))
LIKE = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "gemma3-270m")


@pytest.mark.parametrize("like", LIKE)
def test_static_windows_answer_as_transformers(like: str, tmp_path: Path) -> None:
    synthesise(like, tmp_path / "checkpoint", layers=2, **TINY)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    spec = build_windows(checkpoint, export_portable(checkpoint, tmp_path), SHAPE, tmp_path)
    cache = StaticSession(tmp_path, spec, "cpu-x86_64", threads=1).new_cache(SHAPE.past_tokens)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    ids: list[int] = np.random.default_rng(0).integers(0, checkpoint.vocab_size, 60).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()  # (60, vocab)
    # Two full windows and a padded one, then one token at a time.
    found = [cache.forward(ids[:37]).copy(), *(cache.forward([token]).copy() for token in ids[37:])]
    assert np.abs(np.array(found) - expected[36:]).max() <= 1e-3


def test_same_decisions_as_the_fused_graph(
    static: StaticModel, fused: Engine, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    engine = engine_of(make_bundle(static, "cpu-x86_64", tmp_path))
    assert engine.facts().providers == ("CPUExecutionProvider",)
    with HELD_OUT.open(encoding="utf-8") as reader:
        events = [json.loads(line)["event"] for line in itertools.islice(reader, 16)]
    events += [dict(example.event) for example in engine.golden("triage")]
    for event in events:
        found, expected = (each.decide("triage", event, deadline_s=60) for each in (engine, fused))
        assert found.decision == expected.decision
        # Other kernels, same numbers: nothing of the events before may show through the mask.
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)


def test_rewound_text_leaves_no_trace(static: StaticModel, fused: Engine) -> None:
    session = StaticSession(static.folder, static.spec, "cpu-x86_64", threads=1)
    used = session.new_cache(session.past_tokens)
    for example in fused.golden("triage"):
        ids = fused.encode_event("triage", dict(example.event))
        used.rewind(0)
        fresh = session.new_cache(session.past_tokens)
        assert np.abs(used.forward(ids) - fresh.forward(ids)).max() < 1e-4


class SpoiltPass:
    """A loaded graph whose first pass comes out as no numbers, as of an overflow in half precision."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._is_spoilt = True

    def run(self, *arguments: Any) -> list[Any]:
        results = self._real.run(*arguments)
        factor, self._is_spoilt = (np.float32(np.nan) if self._is_spoilt else np.float32(1)), False
        return [result * factor for result in results]


def test_a_pass_without_numbers_is_not_kept_where_hidden_positions_take_part_in_the_arithmetic(
    static: StaticModel,
) -> None:
    session = StaticSession(static.folder, static.spec, "cpu-x86_64", threads=1)
    expected = session.new_cache(session.past_tokens).forward([7]).copy()
    session.windows = tuple(replace(window, session=SpoiltPass(window.session)) for window in session.windows)
    cache = session.new_cache(session.past_tokens)
    with pytest.raises(PermanentError) as caught:
        cache.forward([7] * 20)
    assert caught.value.code == "worker.bad_logits"
    cache.rewind(0)
    with pytest.raises(PermanentError):
        cache.forward([7])  # the narrow window's first pass
    cache.rewind(0)
    assert np.array_equal(cache.forward([7]), expected)


def test_same_checkpoint_gives_the_same_bytes(static: StaticModel, checkpoint: Checkpoint, tmp_path: Path) -> None:
    portable = export_portable(checkpoint, tmp_path)
    for window in static.spec.windows or ():
        again = build_static(portable, window.tokens, static.spec.past_tokens or 0)
        assert again.SerializeToString(deterministic=True) == (static.folder / window.graph).read_bytes()


def test_graph_holds_nothing_that_16_bits_cannot(static: StaticModel) -> None:
    model = load_graph(static.folder / static.spec.decoder)
    assert not {"IsNaN", "Where", "Sin", "Cos", "Cast"} & {node.op_type for node in model.graph.node}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            assert np.abs(np.frombuffer(tensor.raw_data, np.float32)).max() <= -MASKED_BIAS


@pytest.mark.parametrize(
    ("past_tokens", "windows"), [(64, (1, 16)), (64, (16, 16)), (8, (16, 1)), (64, ()), (64, (0,))]
)
def test_sizes_that_do_not_fit_each_other_are_refused(past_tokens: int, windows: tuple[int, ...]) -> None:
    with pytest.raises(RefusedError, match="window") as caught:
        StaticShape(past_tokens, windows)
    assert caught.value.code == "export.static_shape"


def test_window_beyond_what_every_layer_sees_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sliding = replace(checkpoint, config={**checkpoint.config, "sliding_window": 128})
    for model, past in ((checkpoint, 513), (sliding, 129)):
        with pytest.raises(RefusedError, match="every layer"):
            build_windows(model, tmp_path / "absent.onnx", StaticShape(past), tmp_path)


@pytest.mark.parametrize("change", [{"past_tokens": 351}, {"num_kv_heads": 2}, {"vocab_size": 4095}, {"num_layers": 4}])
def test_manifest_that_describes_other_windows_is_refused(static: StaticModel, change: dict[str, Any]) -> None:
    with pytest.raises(PermanentError, match="graph interface 2") as caught:
        StaticSession(static.folder, replace(static.spec, **change), "cpu-x86_64", threads=1)
    assert caught.value.code == "bundle.unsupported"


def test_text_longer_than_the_past_window_is_refused(static: StaticModel) -> None:
    session = StaticSession(static.folder, static.spec, "cpu-x86_64", threads=1)
    with pytest.raises(PermanentError, match="static window"):
        session.new_cache(session.past_tokens + 1)
    cache = session.new_cache(40)
    cache.append(range(3, 43))
    with pytest.raises(PermanentError, match="do not fit"):
        cache.forward([3])
    with pytest.raises(PermanentError, match="cannot rewind"):
        cache.rewind(41)


@pytest.mark.parametrize(("content", "code"), [(None, "bundle.file_missing"), (b"\x00half", "bundle.file_corrupt")])
def test_damaged_window_is_named(static: StaticModel, tmp_path: Path, content: bytes | None, code: str) -> None:
    save_graph(load_graph(static.folder / "model/window-32.onnx"), tmp_path / "model/window-32.onnx")
    if content is not None:
        (tmp_path / "model/window-1.onnx").write_bytes(content)
    with pytest.raises(EdgeError) as caught:
        StaticSession(tmp_path, static.spec, "cpu-x86_64", threads=1)
    assert caught.value.code == code
