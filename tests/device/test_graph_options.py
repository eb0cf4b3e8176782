"""The engine runs every form of graph that an export can produce, and decides as on the plain one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import ModelProto

from edge_agent.contract.dsse import generate_key
from edge_agent.contract.manifest import ModelSpec, read_manifest
from edge_agent.errors import PermanentError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.head_rows import read_head_rows
from edge_agent.runtime.kv_cache import KvCache, RowPass
from export.build import Workplace, build
from export.graphs.chosen_scores import score_chosen_positions
from export.graphs.graph import LAST_POSITION, load_graph, save_graphs
from export.graphs.int8_kv import measure_kv_scales, quantise_kv
from export.graphs.pruned_head import prune_head
from export.graphs.ragged import add_ragged
from export.graphs.split_head import split_head
from export.progress import LineProgress
from export.proof.greedy import GreedyDecoder
from export.reference.bundle_build import reference_request
from export.request import GraphOptions
from tests.fakes.bundles import BundleVariant

MakeVariant = Callable[[], BundleVariant]
TIE = 1e-3
HELDOUT = Path(__file__).parents[2] / "export/reference/data/heldout.jsonl"


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference bundle as it would be without any option: the graph that every other form is made from."""
    path = tmp_path_factory.mktemp("plain") / "bundle"
    request = replace(reference_request(), graph=GraphOptions(together=False))
    build(request, path, generate_key(), Workplace(LineProgress()))
    return path


@pytest.fixture(scope="module")
def plain(plain_bundle: Path) -> Engine:
    return Engine(open_installed_bundle(plain_bundle, read_manifest(plain_bundle)[1]), 1)


@pytest.fixture
def plain_variant(plain_bundle: Path, tmp_path: Path) -> MakeVariant:
    numbers = iter(range(100))
    return lambda: BundleVariant(plain_bundle, tmp_path / f"bundle-{next(numbers)}", generate_key())


def events(count: int) -> list[dict[str, Any]]:
    lines = HELDOUT.read_text("utf-8").splitlines()[:count]
    return [json.loads(line)["event"] for line in lines]


def write(bundle: BundleVariant, models: Mapping[str, ModelProto], **spec: Any) -> Engine:
    for file in (bundle.path / "model").iterdir():
        file.unlink()
    save_graphs({bundle.path / "model" / name: model for name, model in models.items()})
    return seal(bundle, **spec)


def seal(bundle: BundleVariant, **spec: Any) -> Engine:
    bundle.seal(lambda manifest: manifest["model"].update(spec))
    return Engine(bundle.open(), 1)


def graph_of(bundle: BundleVariant) -> ModelProto:
    return load_graph(bundle.path / "model/decoder.onnx")


def encoder_of(engine: Engine) -> TextEncoder:
    model = engine.bundle.manifest.model
    return TextEncoder(engine.bundle.path / model.tokenizer, model.vocab_size)


def tokens_of_bytes(engine: Engine) -> set[int]:
    return set(encoder_of(engine).spelling.byte_ids)


def head_of(bundle: BundleVariant, ids: set[int]) -> tuple[ModelProto, bytes]:
    """The bundle's graph with a head of some tokens, and the file that says which."""
    model, kept = graph_of(bundle), np.random.default_rng(7).permutation(sorted(ids)).astype(np.int32)
    prune_head(model, kept)
    return model, kept.astype("<i4").tobytes()


def put_head_ids(bundle: BundleVariant, ids: bytes) -> None:
    bundle.put("model/head_ids.bin", ids)


def decisions(engine: Engine, count: int = 25) -> list[tuple[dict[str, Any], dict[str, float]]]:
    answers = [engine.decide("triage", event, deadline_s=60) for event in events(count)]
    return [(answer.decision, answer.confidence) for answer in answers]


def oracle(engine: Engine) -> GreedyDecoder:
    model: ModelSpec = engine.bundle.manifest.model
    return GreedyDecoder(engine.bundle.path / model.decoder, engine.bundle.path / model.tokenizer, model)


def assert_oracle_agrees(engine: Engine, count: int) -> None:
    plain = oracle(engine)
    for event in events(count):
        fast = engine.decide("triage", event, deadline_s=60)
        slow = plain.decide(engine.tasks["triage"], event)
        guarded, _ = engine.tasks["triage"].apply_guards(event, slow.decision)
        if fast.decision != guarded:
            margins = [np.diff(np.sort(choice.logits)[-2:])[0] for choice in slow.choices]
            assert min(margins) < TIE, event


def test_head_apart_changes_no_decision_and_no_confidence(plain: Engine, plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    decoder, head = split_head(graph_of(bundle))
    apart = write(bundle, {"decoder.onnx": decoder, "head.onnx": head}, head="model/head.onnx")
    assert decisions(apart) == decisions(plain)
    assert_oracle_agrees(apart, 3)


def test_weights_that_body_and_head_share_are_stored_once(plain_bundle: Path, plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    decoder, head = split_head(graph_of(bundle))
    write(bundle, {"decoder.onnx": decoder, "head.onnx": head}, head="model/head.onnx")
    size = sum(file.stat().st_size for file in (bundle.path / "model").iterdir())
    whole = (plain_bundle / "model/decoder.onnx").stat().st_size
    # Large tensors begin at page boundaries.
    assert size < whole + 4096 * len(decoder.graph.initializer)


def test_a_pass_without_scores_leaves_the_head_out(plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    decoder, head = split_head(graph_of(bundle))
    apart = write(bundle, {"decoder.onnx": decoder, "head.onnx": head}, head="model/head.onnx")
    cache = apart.prepared("triage").cache
    assert isinstance(cache, KvCache)
    before = cache.forward([5, 6]).copy()
    scores = cache.forward([7])
    cache.rewind(cache.length - 1)
    kept = scores.copy()
    cache.append([9])
    assert np.array_equal(scores, kept)
    assert not np.array_equal(before, kept)


def test_ragged_graph_changes_no_decision(plain: Engine, plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    model = graph_of(bundle)
    add_ragged(model)
    ragged = write(bundle, {"decoder.onnx": model}, ragged=True)
    assert decisions(ragged) == decisions(plain)
    assert_oracle_agrees(ragged, 3)


@pytest.mark.parametrize("is_split", [False, True], ids=["attached", "split"])
def test_scores_at_chosen_positions_are_those_of_the_last_position(
    plain: Engine, plain_variant: MakeVariant, *, is_split: bool
) -> None:
    bundle = plain_variant()
    model = graph_of(bundle)
    add_ragged(model)
    score_chosen_positions(model)
    files = dict(zip(("decoder.onnx", "head.onnx"), split_head(model), strict=True)) if is_split else None
    head = {"head": "model/head.onnx"} if is_split else {}
    scored = write(bundle, files or {"decoder.onnx": model}, ragged=True, score_at=True, **head)
    cache, reference = scored.prepared("triage").cache, plain.prepared("triage").cache
    assert isinstance(cache, KvCache)
    assert isinstance(reference, KvCache)
    tokens, start = [5, 6, 7, 8, 9, 10], cache.length
    (found,) = cache.run([RowPass(0, start, tokens, [1, 3, 5])])
    for row, count in zip(found, (2, 4, 6), strict=True):
        reference.rewind(start)
        np.testing.assert_allclose(row, reference.forward(tokens[:count]), atol=0.05)
    together = cache.run([RowPass(0, start, tokens[:2], [1]), RowPass(1, start, tokens, [3, 5])])
    np.testing.assert_allclose(together[0][0], found[0], atol=0.05)
    np.testing.assert_allclose(together[1], found[1:], atol=0.05)
    reference.rewind(start)
    assert_oracle_agrees(scored, 3)


def test_graph_without_a_last_position_scores_no_chosen_ones(plain_variant: MakeVariant) -> None:
    model = graph_of(plain_variant())
    next(node for node in model.graph.node if node.name == LAST_POSITION).name = "other"
    with pytest.raises(PermanentError) as caught:
        score_chosen_positions(model)
    assert caught.value.code == "export.graph_unexpected"


def test_int8_caches_decide_as_the_oracle_with_int8_caches(plain: Engine, plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    model = graph_of(bundle)
    prompts = [oracle(plain).prompt(plain.tasks["triage"], event) for event in events(40)[20:]]
    quantise_kv(model, measure_kv_scales(model, prompts))
    small = write(bundle, {"decoder.onnx": model}, kv_dtype="int8")
    same = [mine == theirs for (mine, _), (theirs, _) in zip(decisions(small), decisions(plain), strict=True)]
    assert sum(same) >= 23, "int8 caches cost more than two answers of 25"
    assert_oracle_agrees(small, 3)


def test_every_option_at_once(plain: Engine, plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    model, ids = head_of(bundle, tokens_of_bytes(plain) | set(range(2048)))
    add_ragged(model)
    decoder, head = split_head(model)
    put_head_ids(bundle, ids)
    files = {"decoder.onnx": decoder, "head.onnx": head}
    for file in (bundle.path / "model").glob("*.onnx"):
        file.unlink()
    save_graphs({bundle.path / "model" / name: model for name, model in files.items()})
    combined = seal(bundle, head="model/head.onnx", head_ids="model/head_ids.bin", ragged=True)
    assert_oracle_agrees(combined, 5)


def pruned(bundle: BundleVariant, ids: set[int], **spec: Any) -> Engine:
    model, kept = head_of(bundle, ids)
    put_head_ids(bundle, kept)
    (bundle.path / "model/decoder.onnx").write_bytes(model.SerializeToString())
    return seal(bundle, head_ids="model/head_ids.bin", **spec)


def answer_tokens(engine: Engine) -> set[int]:
    task, encoder = engine.tasks["triage"], encoder_of(engine)
    values = [value for field in task.output_fields for value in getattr(field, "values", ("true", "false"))]
    keys = [f'",{json.dumps(field.name)}:"' for field in task.output_fields]
    return {token for text in [*values, *keys, '"}', "}"] for token in encoder.encode(text)}


def test_head_with_every_token_of_the_answers_changes_no_decision_and_no_confidence(
    plain: Engine, plain_variant: MakeVariant
) -> None:
    few = pruned(plain_variant(), tokens_of_bytes(plain) | answer_tokens(plain))
    assert len(read_head_rows(4096, few.bundle.path / "model/head_ids.bin")) < 600
    for (mine, sure), (theirs, expected) in zip(decisions(few), decisions(plain), strict=True):
        assert mine == theirs
        # Another number of rows is another loop in the kernel: the last digit may differ.
        assert sure == pytest.approx(expected, abs=1e-6)


def test_values_whose_tokens_the_head_lacks_are_reached_by_bytes(plain: Engine, plain_variant: MakeVariant) -> None:
    bytes_alone = pruned(plain_variant(), tokens_of_bytes(plain))
    task = bytes_alone.tasks["triage"]
    found = decisions(bytes_alone)
    assert all(task.check_decision(decision) == [] for decision, _ in found)
    assert len({json.dumps(decision) for decision, _ in found}) > 3, "every event got the same answer"
    assert_oracle_agrees(bytes_alone, 8)


OPEN_OUTPUT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "stop": {"enum": ["stop", "stop_all", "stop_all_now", 'st"o\\p', "größer", "漢字"]},
        "note": {"type": "string", "maxLength": 12},
        "wide": {"type": "integer", "minimum": -70000, "maximum": 1000000},
        "level": {"type": "integer", "minimum": -3, "maximum": 120},
        "urgent": {"type": "boolean"},
    },
}


@pytest.mark.parametrize("first_ids", [0, 700, 4096])
def test_open_fields_and_new_values_stay_within_the_schema_with_any_head(
    plain: Engine, plain_variant: MakeVariant, first_ids: int
) -> None:
    bundle = plain_variant()
    task = yaml.safe_load((bundle.path / "tasks/triage/task.yaml").read_text("utf-8"))
    task.update(output=OPEN_OUTPUT, thresholds={}, guards=[])
    bundle.put("tasks/triage/task.yaml", json.dumps(task))
    bundle.drop("tasks/triage/golden.jsonl")
    bundle.drop("tasks/triage/calibration.json")
    changed = pruned(bundle, tokens_of_bytes(plain) | set(range(first_ids)))
    kept = set(read_head_rows(4096, bundle.path / "model/head_ids.bin").ids.tolist())
    for event in events(6):
        answer = changed.decide("triage", event, deadline_s=60)
        assert changed.tasks["triage"].check_decision(answer.decision) == []
        assert all(0 < share <= 1 for share in answer.confidence.values())
    assert_oracle_agrees(changed, 4)
    assert tokens_of_bytes(plain) <= kept


def test_head_without_the_bytes_that_a_task_needs_is_refused_at_load(plain: Engine, plain_variant: MakeVariant) -> None:
    with pytest.raises(PermanentError, match="single bytes") as caught:
        pruned(plain_variant(), {1, 2, 3})
    assert caught.value.code == "bundle.unsupported"


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0\0\0", np.array([4096, 5], "<i4").tobytes(), np.array([5, -1], "<i4").tobytes(),
     np.array([7, 3, 7], "<i4").tobytes()],
    ids=["empty", "cut short", "beyond", "negative", "twice"],
)  # fmt: skip
def test_head_ids_that_are_not_those_of_different_tokens_are_refused(plain_variant: MakeVariant, raw: bytes) -> None:
    bundle = plain_variant()
    put_head_ids(bundle, raw)
    with pytest.raises(PermanentError) as caught:
        seal(bundle, head_ids="model/head_ids.bin")
    assert caught.value.code == "bundle.unsupported"


def test_manifest_that_promises_another_number_of_rows_is_refused(plain_variant: MakeVariant) -> None:
    bundle = plain_variant()
    put_head_ids(bundle, np.arange(100, dtype="<i4").tobytes())
    with pytest.raises(PermanentError, match="logits") as caught:
        seal(bundle, head_ids="model/head_ids.bin")
    assert caught.value.code == "bundle.unsupported"


@pytest.mark.parametrize(
    "spec", [{"head": "model/decoder.onnx"}, {"ragged": True}, {"score_at": True}], ids=["head", "ragged", "score_at"]
)
def test_manifest_that_promises_another_form_of_graph_is_refused(
    plain_variant: MakeVariant, spec: dict[str, Any]
) -> None:
    with pytest.raises(PermanentError, match="graph interface 1") as caught:
        seal(plain_variant(), **spec)
    assert caught.value.code == "bundle.unsupported"
