"""Planned decoding gives what plain decoding gives, in fewer passes, for any schema and any model."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.contract.document import read_document
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.decoder import Decoded, decode
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, Done, compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from tests.fakes import tokenizers
from tests.fakes.scoring_model import ConstantScores, HashModel, SlowModel

VOCAB = 512
EOS = 1
PROMPT = [40, 41, 42]
FAR = math.inf


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"), VOCAB)


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    return TextEncoder(tokenizers.byte_level(folder / "tokenizer.json", splits_words=False), VOCAB)


def task_of(properties: dict[str, Any]) -> TaskSpec:
    return read_document(
        TaskSpec,
        {
            "name": "task",
            "version": 1,
            "prompt": {"prefix": "p", "event": [{"field": "text", "label": "text"}]},
            "output": {"type": "object", "properties": properties},
        },
    )


def plan_of(task: TaskSpec, encoder: TextEncoder) -> AnswerPlan:
    return compile_plan(task, encoder, lambda: GuidedGrammars(encoder, VOCAB, EOS))


def run(plan: AnswerPlan, model: HashModel) -> Decoded:
    return decode(model, plan, PROMPT, {}, FAR)


def plain_greedy(task: TaskSpec, encoder: TextEncoder, model: HashModel) -> list[int]:
    """One token a step, over the list of all answers: the slowest decoder that can be right."""
    values: list[list[str]] = []
    for spec in task.output["properties"].values():
        if "enum" in spec:
            values.append([json.dumps(v, ensure_ascii=False) for v in spec["enum"]])
        elif spec["type"] == "boolean":
            values.append(["false", "true"])
        else:
            values.append([str(v) for v in range(spec["minimum"], spec["maximum"] + 1)])
    names = [json.dumps(name) for name in task.output["properties"]]
    answers = []
    for choice in itertools.product(*values):
        pieces, text = [], "{"
        for name, value in zip(names, choice, strict=True):
            quote = '"' if value.startswith('"') else ""
            pieces += [f"{text}{name}:{quote}", value.removeprefix(quote).removesuffix(quote)]
            text = f"{quote},"
        pieces.append(text.removesuffix(",") + "}")
        answers.append([token for piece in pieces for token in encoder.encode(piece)])
    taken: list[int] = []
    while answers != [taken]:
        allowed = sorted({a[len(taken)] for a in answers})
        scores = model.scores_after([*PROMPT, *taken])
        taken.append(max(allowed, key=lambda token: scores[token]) if len(allowed) > 1 else allowed[0])
        answers = [a for a in answers if a[: len(taken)] == taken]
    return taken


words = st.text(st.sampled_from('abs tp_-"\\/{}:,é漢🔥0'), min_size=1, max_size=6)
enums = st.lists(words, min_size=1, max_size=5, unique=True).map(lambda v: {"enum": v})
integers = st.tuples(st.integers(-50, 50), st.integers(0, 30)).map(
    lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}
)
booleans = st.just({"type": "boolean"})
schemas = st.lists(enums | integers | booleans, min_size=1, max_size=4).map(
    lambda specs: {f"field_{n}": spec for n, spec in enumerate(specs)}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(properties=schemas, seed=st.integers(0, 1000), merges=st.booleans())
def test_equals_plain_greedy_decoding_of_any_closed_schema(
    encoder: TextEncoder, merging: TextEncoder, properties: dict[str, Any], seed: int, *, merges: bool
) -> None:
    chosen = merging if merges else encoder
    task = task_of(properties)
    plan = plan_of(task, chosen)
    model = HashModel(VOCAB, seed)
    decoded = run(plan, model)
    assert decoded.tokens == plain_greedy(task, chosen, HashModel(VOCAB, seed))
    assert task.check_decision(dict(decoded.values)) == []
    assert chosen.decode(decoded.tokens) == json.dumps(decoded.values, separators=(",", ":"), ensure_ascii=False)
    assert len(decoded.tokens) <= plan.max_tokens
    assert decoded.passes == model.passes
    assert all(0 < p <= 1 for p in decoded.confidence.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(properties=schemas, seed=st.integers(0, 1000))
def test_another_grammar_engine_accepts_every_answer(
    encoder: TextEncoder, properties: dict[str, Any], seed: int
) -> None:
    task = task_of(properties)
    decoded = run(plan_of(task, encoder), HashModel(VOCAB, seed))
    schema = {
        "type": "object",
        "properties": {k: {"type": "string", **v} if "enum" in v else v for k, v in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(encoder.spec_json(), n_vocab=VOCAB, eos_token=EOS), grammar)
    assert matcher.consume_tokens(decoded.tokens), matcher.get_error()
    assert matcher.is_accepting()


def test_splitting_into_passes_does_not_change_the_answer(encoder: TextEncoder) -> None:
    task = task_of({"a": {"enum": ["stop", "stop_all", "go"]}, "b": {"type": "boolean"}})
    decoded = run(plan_of(task, encoder), HashModel(VOCAB, 4))
    model = HashModel(VOCAB, 4)
    run(plan_of(task, encoder), model)
    # The model saw the prompt and all of the answer but the closing tokens, once and in order.
    assert model.tokens == [*PROMPT, *decoded.tokens][: len(model.tokens)]


def test_open_fields_stay_within_their_bounds(encoder: TextEncoder) -> None:
    task = task_of(
        {
            "note": {"type": "string", "maxLength": 9},
            "wide": {"type": "integer", "minimum": -12345, "maximum": 99999},
            "flag": {"type": "boolean"},
            "tail": {"type": "string", "maxLength": 1},
        }
    )
    plan = plan_of(task, encoder)
    for seed in range(60):
        decoded = run(plan, HashModel(VOCAB, seed))
        assert task.check_decision(dict(decoded.values)) == []
        assert len(decoded.tokens) <= plan.max_tokens
        text = llguidance.LLTokenizer(encoder.spec_json(), n_vocab=VOCAB, eos_token=EOS).decode_bytes(decoded.tokens)
        assert json.loads(text) == decoded.values


def test_string_that_would_never_end_is_closed_at_a_character(encoder: TextEncoder) -> None:
    scores = np.zeros(VOCAB, np.float32)
    first_byte_of_a_kanji = encoder.encode("漢")[0]
    scores[first_byte_of_a_kanji] = 50
    task = task_of({"note": {"type": "string", "maxLength": 5}})
    plan = plan_of(task, encoder)
    decoded = decode(ConstantScores(scores), plan, PROMPT, {}, FAR)
    assert 1 <= len(str(decoded.values["note"])) <= 5
    assert len(decoded.tokens) <= plan.max_tokens


def test_values_that_begin_alike_share_their_tokens_and_part_once(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"enum": ["stop_all", "stop"]}}), encoder)
    (field,) = plan.fields
    assert isinstance(field, ClosedField)
    assert field.forced == tuple(encoder.encode("stop"))
    assert isinstance(field.root, Branch)
    assert len(field.root.ids) == 2


def test_single_value_costs_no_pass(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"enum": ["only"]}}), encoder)
    model = HashModel(VOCAB)
    decoded = run(plan, model)
    assert (decoded.values, decoded.confidence, model.passes) == ({"a": "only"}, {"a": 1.0}, 0)


@pytest.mark.parametrize(
    "spec",
    [
        {"enum": ["stop", "stop_all", "stop_all_now", "start", "go"]},
        {"type": "integer", "minimum": -20, "maximum": 130},
        {"type": "boolean"},
    ],
    ids=["enum", "integer", "boolean"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
def test_probabilities_over_all_values_sum_to_one(
    encoder: TextEncoder, spec: dict[str, Any], temperature: float
) -> None:
    plan = plan_of(task_of({"a": spec}), encoder)
    (field,) = plan.fields
    assert isinstance(field, ClosedField)
    scores = np.random.default_rng(5).normal(0, 2, VOCAB)

    def shares(node: Branch | Done) -> dict[Any, float]:
        if isinstance(node, Done):
            return {node.value: 1.0}
        exponentials = np.exp(scores[node.ids] / temperature)
        weights = exponentials / exponentials.sum()
        return {
            value: float(weight) * share
            for weight, edge in zip(weights, node.edges, strict=True)
            for value, share in shares(edge.target).items()
        }

    shared = shares(field.root)
    assert sum(shared.values()) == pytest.approx(1.0)
    decoded = decode(ConstantScores(scores.astype(np.float32)), plan, PROMPT, {"a": temperature}, FAR)
    assert decoded.confidence["a"] == pytest.approx(shared[decoded.values["a"]], rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_not_decided_on(encoder: TextEncoder, bad: float) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}}), encoder)
    scores = np.random.default_rng(1).normal(0, 1, VOCAB).astype(np.float32)
    scores[encoder.encode("true")[0]] = bad
    with pytest.raises(PermanentError) as caught:
        decode(ConstantScores(scores), plan, PROMPT, {}, FAR)
    assert caught.value.code == "worker.bad_logits"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_a_fault_also_where_no_answer_can_be(encoder: TextEncoder, bad: float) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}}), encoder)
    scores = np.random.default_rng(1).normal(0, 1, VOCAB).astype(np.float32)
    (stray,) = encoder.encode("\n")
    scores[stray] = bad
    with pytest.raises(PermanentError) as caught:
        decode(ConstantScores(scores), plan, PROMPT, {}, FAR)
    assert caught.value.code == "worker.bad_logits"


def test_a_model_that_scores_everything_the_same_is_not_decided_on(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}}), encoder)
    with pytest.raises(PermanentError) as caught:
        decode(ConstantScores(np.zeros(VOCAB, np.float32)), plan, PROMPT, {}, FAR)
    assert caught.value.code == "worker.bad_logits"


def test_equal_scores_of_two_values_alone_are_a_tie_not_a_fault(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}}), encoder)
    scores = np.random.default_rng(1).normal(0, 1, VOCAB).astype(np.float32)
    for word in ("true", "false"):
        scores[encoder.encode(word)[0]] = 2.0
    assert decode(ConstantScores(scores), plan, PROMPT, {}, FAR).confidence == {"a": 0.5}


def test_huge_scores_do_not_overflow(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}}), encoder)
    scores = np.full(VOCAB, -3e38, np.float32)
    scores[encoder.encode("true")[0]] = 3e38
    assert decode(ConstantScores(scores), plan, PROMPT, {}, FAR).values == {"a": True}


def test_no_pass_begins_after_the_deadline(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}, "b": {"type": "boolean"}}), encoder)
    deadline_at_s = time.monotonic() + 0.5
    model = SlowModel(VOCAB, deadline_at_s)
    with pytest.raises(PermanentError) as caught:
        decode(model, plan, PROMPT, {}, deadline_at_s)
    assert caught.value.code == "worker.deadline"
    assert (model.passes, caught.value.context) == (1, {"passes": 1})


def test_an_answer_whose_last_pass_was_late_is_still_given(encoder: TextEncoder) -> None:
    plan = plan_of(task_of({"a": {"type": "boolean"}}), encoder)
    deadline_at_s = time.monotonic() + 0.5
    assert decode(SlowModel(VOCAB, deadline_at_s), plan, PROMPT, {}, deadline_at_s).passes == 1


def test_tokenizer_that_cannot_spell_a_value_is_refused(tmp_path: Path) -> None:
    encoder = TextEncoder(tokenizers.lower_casing(tmp_path / "tokenizer.json"), VOCAB)
    with pytest.raises(PermanentError, match="Low") as caught:
        plan_of(task_of({"a": {"enum": ["low", "Low"]}}), encoder)
    assert caught.value.code == "bundle.unsupported"


def test_tokenizer_whose_pieces_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    encoder = TextEncoder(tokenizers.metaspace(tmp_path / "tokenizer.json"), VOCAB)
    with pytest.raises(PermanentError) as caught:
        plan_of(task_of({"category": {"enum": ["thermal", "high"]}}), encoder)
    assert caught.value.code == "bundle.unsupported"
