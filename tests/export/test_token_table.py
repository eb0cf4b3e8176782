"""A table says of every text what the tokenizer's library says, and what cannot be one is left to the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from edge_agent.contract.event import clean_text
from edge_agent.errors import PermanentError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.prompt import rendered_event
from edge_agent.runtime.tensors import cut_tensors
from edge_agent.runtime.token_table import FACTS, TokenTable
from export.checkpoint import token_table as making
from export.checkpoint.token_table import UnsuitableTokenizerError, token_table
from tests.bench.decision_task import load_decision_task
from tests.bench.made import HELDOUT, REFERENCE
from tests.fakes import tokenizers
from tests.fakes.hostile_texts import HOSTILE_TEXTS, SCRIPTS

REFERENCE_TOKENIZER = REFERENCE / "checkpoint" / "tokenizer.json"
VOCAB = 4096


def table_of(file: Path) -> bytes:
    return token_table(file, file.read_text("utf-8"), fewest_tokens=0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "tokens.safetensors"
    path.write_bytes(table_of(REFERENCE_TOKENIZER))
    return path


@pytest.fixture(scope="module")
def mapped(table: Path) -> TextEncoder:
    return TextEncoder(REFERENCE_TOKENIZER, VOCAB, table)


@pytest.fixture(scope="module")
def library() -> TextEncoder:
    return TextEncoder(REFERENCE_TOKENIZER, VOCAB)


def test_every_held_out_event_is_the_same_tokens(mapped: TextEncoder, library: TextEncoder) -> None:
    task = load_decision_task(REFERENCE / "task")
    texts = [rendered_event(task, json.loads(line)["event"]) for line in HELDOUT.read_text("utf-8").splitlines()]
    assert [mapped.encode(text) for text in texts] == [library.encode(text) for text in texts]
    assert [mapped.decode(mapped.encode(text)) for text in texts] == texts


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_is_the_same_tokens(mapped: TextEncoder, library: TextEncoder, text: str) -> None:
    assert mapped.encode(text) == library.encode(text)


@pytest.mark.parametrize("text", [*HOSTILE_TEXTS.values(), *SCRIPTS.values()], ids=[*HOSTILE_TEXTS, *SCRIPTS])
def test_hostile_text_is_the_same_tokens(mapped: TextEncoder, library: TextEncoder, text: str) -> None:
    cleaned = clean_text(text, len(text))  # as events are
    assert mapped.encode(cleaned) == library.encode(cleaned)


def test_every_token_is_spelled_alike(mapped: TextEncoder, library: TextEncoder) -> None:
    tokens = range(VOCAB)
    assert [mapped.spelling.bytes_of(t) for t in tokens] == [library.spelling.bytes_of(t) for t in tokens]
    assert mapped.spelling.byte_ids == library.spelling.byte_ids
    assert mapped.control_ids == library.control_ids


def test_grammar_engine_gets_the_tokenizer_itself(mapped: TextEncoder, library: TextEncoder) -> None:
    assert json.loads(mapped.spec_json()) == json.loads(library.spec_json())


def test_word_of_sixteen_thousand_letters_is_no_way_to_stop_the_worker(mapped: TextEncoder) -> None:
    assert mapped.decode(mapped.encode("ab" * 8000)) == "ab" * 8000


def test_text_that_is_no_unicode_is_an_error_of_ours(mapped: TextEncoder) -> None:
    with pytest.raises(PermanentError) as caught:
        mapped.encode("a\ud800b")
    assert caught.value.code == "tokenizer.failed"


def test_control_token_in_text_is_its_characters(tmp_path: Path) -> None:
    file = tokenizers.with_plain_added_token(tmp_path / "tokenizer.json", "<tool_call>")
    (tmp_path / "table").write_bytes(table_of(file))
    mapped, library = TextEncoder(file, 512, tmp_path / "table"), TextEncoder(file, 512)
    for token in (*tokenizers.SPECIAL, "<tool_call>"):
        assert mapped.encode(f"a{token}b") == library.encode(f"a{token}b")
        assert mapped.control_ids.isdisjoint(mapped.encode(token))


def test_merges_written_as_one_text_are_read_too(tmp_path: Path) -> None:
    spec = json.loads(REFERENCE_TOKENIZER.read_text("utf-8"))
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    assert table_of(tmp_path / "tokenizer.json") == table_of(REFERENCE_TOKENIZER)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tokenizers.metaspace, "no byte-level BPE"),
        (tokenizers.byte_fallback, "no byte-level BPE"),
    ],
)
def test_other_families_are_left_to_the_library(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsuitableTokenizerError, match=reason):
        table_of(make(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("option", ["ignore_merges", "byte_fallback"])
def test_rules_that_the_device_does_not_know_are_left_to_the_library(option: str, tmp_path: Path) -> None:
    spec = json.loads(REFERENCE_TOKENIZER.read_text("utf-8"))
    spec["model"][option] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(UnsuitableTokenizerError, match=option):
        table_of(tmp_path / "tokenizer.json")


def test_small_tokenizer_is_left_to_the_library() -> None:
    with pytest.raises(UnsuitableTokenizerError, match="fewer than"):
        token_table(REFERENCE_TOKENIZER, "any")


def test_table_that_merges_otherwise_is_found_out(table: Path) -> None:
    arrays = load(table.read_bytes())
    arrays["ranks"] = arrays["ranks"][::-1].copy()
    wrong = saved(arrays, facts_of(table))
    with pytest.raises(UnsuitableTokenizerError, match="in a way of its own"):
        making.prove(wrong, REFERENCE_TOKENIZER, VOCAB)


def facts_of(table: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cut_tensors(np.frombuffer(table.read_bytes(), np.uint8)).metadata[FACTS])
    return found


def saved(arrays: dict[str, Any], facts: dict[str, Any]) -> bytes:
    return save(arrays, {FACTS: json.dumps(facts)})


def change(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def apply(arrays: dict[str, Any], facts: dict[str, Any]) -> None:
        if name in arrays:
            arrays[name] = value(arrays[name])
        else:
            facts[name] = value(facts[name])

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        change("ranks", lambda ranks: ranks[:-1].copy()),
        change("joined", lambda joined: joined + VOCAB),
        change("ends", lambda ends: ends[::-1].copy()),
        change("text", lambda text: text[:-1].copy()),
        change("format", lambda _: 2),
        change("control", lambda _: "none"),
        change("pre_tokenizer", lambda _: {"type": "Unheard"}),
    ],
)
def test_table_that_does_not_hold_together_is_refused(
    damage: Callable[[dict[str, Any], dict[str, Any]], None], table: Path, tmp_path: Path
) -> None:
    arrays, facts = load(table.read_bytes()), facts_of(table)
    damage(arrays, facts)
    (tmp_path / "table").write_bytes(saved(arrays, facts))
    with pytest.raises(PermanentError) as caught:
        TokenTable(tmp_path / "table")
    assert caught.value.code == "bundle.unsupported"


@pytest.mark.parametrize("cut", [0, 4, 100, 20_000])
def test_truncated_table_is_refused(cut: int, table: Path, tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(table.read_bytes()[:cut])
    with pytest.raises(PermanentError) as caught:
        TokenTable(tmp_path / "table")
    assert caught.value.code == "bundle.unsupported"


def test_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"tokens\.safetensors"):
        TokenTable(tmp_path / "tokens.safetensors")


def test_table_of_more_tokens_than_the_model_has_is_refused(table: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        TextEncoder(REFERENCE_TOKENIZER, 100, table)
    assert caught.value.code == "bundle.unsupported"
