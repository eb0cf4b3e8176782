"""A head of any tokens that include the bytes reaches every value, and chooses nothing that it has no row for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.contract.document import read_document
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.decoder import Decoded, decode
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import Branch, ClosedField, Done, compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from edge_agent.runtime.head_rows import HeadRows, read_head_rows
from edge_agent.runtime.spelling import read_spelling
from tests.fakes import tokenizers
from tests.fakes.hostile_texts import HOSTILE_TEXTS, SCRIPTS
from tests.fakes.scoring_model import HashModel

VOCAB = 512
EOS = 1
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "byte-level": tokenizers.byte_level,
    "byte fallback": tokenizers.byte_fallback,
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    path = FAMILIES[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return TextEncoder(path, VOCAB)


class HeadedModel(HashModel):
    """Scores rows, not tokens, and remembers whether the last one that was chosen had a row."""

    def __init__(self, head: HeadRows, seed: int) -> None:
        super().__init__(VOCAB, seed)
        self._head = head

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return super().forward(tokens)[self._head.ids]


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


def head_with(encoder: TextEncoder, others: set[int]) -> HeadRows:
    ids = sorted(encoder.spelling.byte_ids | others)
    return HeadRows(VOCAB, np.array(ids, np.int32))


def decided(task: TaskSpec, encoder: TextEncoder, head: HeadRows, seed: int) -> Decoded:
    plan = compile_plan(task, encoder, lambda: GuidedGrammars(encoder, VOCAB, EOS, head), head)
    decoded = decode(HeadedModel(head, seed), plan, [40, 41], {}, math.inf)
    assert len(decoded.tokens) <= plan.max_tokens
    return decoded


def text_of(encoder: TextEncoder, tokens: list[int]) -> str:
    return b"".join(encoder.spelling.bytes_of(token) for token in tokens).decode("utf-8")


words = st.text(st.sampled_from('abs tp_-"\\/{}:,é漢🔥0'), min_size=1, max_size=6) | st.sampled_from(
    ["stop", "stop_all", "thermal", "therm", "high", "hi", "low", "pump leaks"]
)
enums = st.lists(words, min_size=1, max_size=6, unique=True).map(lambda v: {"enum": v})
integers = st.tuples(st.integers(-50, 50), st.integers(0, 30)).map(
    lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}
)
strings = st.integers(1, 8).map(lambda n: {"type": "string", "maxLength": n})
schemas = st.lists(enums | integers | strings | st.just({"type": "boolean"}), min_size=1, max_size=4).map(
    lambda specs: {f"field_{n}": spec for n, spec in enumerate(specs)}
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(properties=schemas, seed=st.integers(0, 1000), others=st.sets(st.integers(0, 400), max_size=40))
# A head without the quote's own token: the string must be closed by the quote's byte, in time.
@example(
    properties={"field_0": {"type": "boolean"}, "field_1": {"type": "string", "maxLength": 7}}, seed=202, others=set()
)
def test_answers_are_valid_whatever_the_head_lacks(
    encoder: TextEncoder, properties: dict[str, Any], seed: int, others: set[int]
) -> None:
    task = task_of(properties)
    decoded = decided(task, encoder, head_with(encoder, others), seed)
    assert task.check_decision(dict(decoded.values)) == []
    assert json.loads(text_of(encoder, decoded.tokens)) == decoded.values
    assert all(0 < share <= 1 for share in decoded.confidence.values())


def branches(node: Branch | Done) -> list[Branch]:
    if isinstance(node, Done):
        return []
    return [node, *itertools.chain.from_iterable(branches(edge.target) for edge in node.edges)]


def leaves(node: Branch | Done) -> list[Any]:
    return [node.value] if isinstance(node, Done) else [value for edge in node.edges for value in leaves(edge.target)]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(words, min_size=2, max_size=6, unique=True), others=st.sets(st.integers(0, 400), max_size=40))
def test_every_value_has_a_way_over_tokens_that_have_rows(
    encoder: TextEncoder, values: list[str], others: set[int]
) -> None:
    head = head_with(encoder, others)
    plan = compile_plan(task_of({"a": {"enum": values}}), encoder, lambda: GuidedGrammars(encoder, VOCAB, EOS), head)
    (field,) = plan.fields
    assert isinstance(field, ClosedField)
    assert sorted(leaves(field.root)) == sorted(values)
    for branch in branches(field.root):
        assert len(branch.ids) == len(branch.edges) > 1
        assert np.array_equal(head.ids[branch.rows], branch.ids)


def test_head_with_every_token_of_a_choice_leaves_the_choice_as_it_was(encoder: TextEncoder) -> None:
    task = task_of({"a": {"enum": ["stop", "high", "low"]}, "b": {"type": "boolean"}})
    plain = compile_plan(task, encoder, lambda: GuidedGrammars(encoder, VOCAB, EOS))
    kept = {
        int(token)
        for field in plain.fields
        if isinstance(field, ClosedField)
        for branch in branches(field.root)
        for token in branch.ids
    }
    head = head_with(encoder, kept)
    pruned = compile_plan(task, encoder, lambda: GuidedGrammars(encoder, VOCAB, EOS), head)
    model, whole = HeadedModel(head, 3), HashModel(VOCAB, 3)
    few, all_of_them = (decode(m, p, [40], {}, math.inf) for m, p in ((model, pruned), (whole, plain)))
    assert (few.values, few.tokens, few.passes) == (all_of_them.values, all_of_them.tokens, all_of_them.passes)
    assert few.confidence == pytest.approx(all_of_them.confidence)


def test_bytes_of_tokens_join_to_the_text(encoder: TextEncoder) -> None:
    for text in [*HOSTILE_TEXTS, *SCRIPTS, "stop_all pump leaks", "größer 漢字 🔥"]:
        ids = encoder.encode(text)
        if encoder.decode(ids) != text:  # a tokenizer may normalise: then there is nothing to compare with
            continue
        assert b"".join(encoder.spelling.bytes_of(token) for token in ids) == text.encode()
        spelled = [single for token in ids for single in encoder.spelling.by_bytes(token)]
        assert b"".join(encoder.spelling.bytes_of(token) for token in spelled) == text.encode()
        assert set(spelled) <= encoder.spelling.byte_ids


def test_bytes_are_those_that_the_grammar_engine_sees(encoder: TextEncoder) -> None:
    other = llguidance.LLTokenizer(encoder.spec_json(), n_vocab=VOCAB, eos_token=EOS)
    for text in ("stop_all", "größer", "漢字 🔥", '{"a":"b c"}'):
        for token in encoder.encode(text):
            assert other.decode_bytes([token]) == encoder.spelling.bytes_of(token)
    for token in encoder.spelling.byte_ids:
        if encoder.spelling.bytes_of(token) == b"\xff":  # marks control tokens there; no text has it
            continue
        assert other.decode_bytes([token]) == encoder.spelling.bytes_of(token)


def test_control_token_writes_nothing(encoder: TextEncoder) -> None:
    assert encoder.spelling.bytes_of(EOS) == b""
    with pytest.raises(PermanentError) as caught:
        encoder.spelling.by_bytes(EOS)
    assert caught.value.code == "tokenizer.no_bytes"


@pytest.mark.parametrize("make", [tokenizers.metaspace, lambda p: tokenizers.byte_fallback(p, missing=frozenset({65}))])
def test_tokenizer_without_a_token_for_each_byte_is_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        read_spelling(make(tmp_path / "tokenizer.json").read_text("utf-8"))
    assert caught.value.code == "tokenizer.no_bytes"


def test_bytes_that_no_text_has_may_be_missing(tmp_path: Path) -> None:
    path = tokenizers.byte_fallback(tmp_path / "tokenizer.json", missing=frozenset({0xC0, 0xFF}))
    assert len(read_spelling(path.read_text("utf-8")).byte_ids) == 254


def test_open_field_without_the_bytes_is_refused_at_load(encoder: TextEncoder) -> None:
    head = HeadRows(VOCAB, np.array([1, 2, 3], np.int32))
    with pytest.raises(PermanentError, match="single bytes") as caught:
        GuidedGrammars(encoder, VOCAB, EOS, head)
    assert caught.value.code == "bundle.unsupported"


def test_whole_head_is_no_detour() -> None:
    whole, some = HeadRows(VOCAB), HeadRows(VOCAB, np.array([4, 7, 9], np.int32))
    ids = np.array([4, 9], np.int64)
    assert whole.rows(ids) is ids
    assert whole.kept(ids) is ids
    assert some.rows(ids).tolist() == [0, 2]
    assert some.kept(np.array([3, 4, 5, 9])).tolist() == [4, 9]
    assert [token in some for token in (3, 4)] == [False, True]


@pytest.mark.parametrize("count", [3, VOCAB])
def test_rows_may_lie_in_any_order(count: int) -> None:
    ids = np.random.default_rng(5).permutation(VOCAB)[:count].astype(np.int32)
    head = HeadRows(VOCAB, ids)
    assert head.rows(np.sort(ids)).tolist() == [ids.tolist().index(token) for token in sorted(ids)]
    assert head.kept(np.arange(VOCAB)).tolist() == sorted(ids)
    assert all(token in head for token in ids.tolist())


def test_file_of_head_ids_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"head_ids\.bin"):
        read_head_rows(VOCAB, tmp_path / "head_ids.bin")
