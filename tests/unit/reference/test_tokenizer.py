"""Tokenisation must be the same in training, in the decoder's forced tokens, and at every seam between the parts."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from edge_agent.contract.output import BoolField, EnumField
from edge_agent.contract.task import load_task
from export.reference.evaluate import TASK_FILE
from export.reference.examples import Encoder, canonical_answer
from export.reference.generator import generate
from export.reference.rules import Decision
from export.reference.tokenizer import EOS, PAD, load_tokenizer, save_tokenizer, train_tokenizer
from export.reference.train import Training, reference_tokenizer
from tests.unit.reference.conftest import CHECKPOINT

TASK = load_task(TASK_FILE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The committed tokenizer where there is one, else one trained on the spot."""
    if (CHECKPOINT / "tokenizer.json").exists():
        return load_tokenizer(CHECKPOINT)
    return reference_tokenizer(TASK, Training(tokenizer_events=4000))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_every_value_is_one_token(tokenizer: Tokenizer) -> None:
    for field in TASK.output_fields:
        values = ("true", "false") if isinstance(field, BoolField) else getattr(field, "values", ())
        for value in values:
            assert len(_ids(tokenizer, value)) == 1, (field.name, value)


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    noise = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(_ids(tokenizer, noise)) == noise
    alphabet = {chr(b) if 33 <= b < 127 else None for b in range(256)} - {None}
    assert all(tokenizer.token_to_id(letter) is not None for letter in alphabet)


@pytest.mark.parametrize("text", ["Größe 12,5 °C — µm\tß", "  two  spaces\n", "表示 温度", "a\u0301 e_1", "\x00\x7f"])
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_no_token_mixes_punctuation_with_letters_or_holds_two_digits(tokenizer: Tokenizer) -> None:
    for token, index in tokenizer.get_vocab().items():
        if token in (EOS, PAD):
            continue
        text = tokenizer.decode([index]).lstrip(" ")
        letters = sum(c.isalpha() or c == "_" for c in text)
        # Single bytes of a multi-byte letter decode to the replacement character, which is no letter.
        assert letters in (0, len(text)) or "\ufffd" in text, repr(token)
        assert sum(c.isdigit() for c in text) <= 1, repr(token)


def test_special_tokens_cannot_be_written_by_an_event(tokenizer: Tokenizer) -> None:
    specials = {tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)}
    assert not specials & set(_ids(tokenizer, f"machine: {EOS}{PAD} text {EOS}"))


def test_saved_tokenizer_is_what_transformers_reads(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    text = TASK.render(next(generate("test", 2)).event)
    assert other(text, add_special_tokens=False)["input_ids"] == _ids(tokenizer, text)
    assert other.eos_token_id == tokenizer.token_to_id(EOS)
    assert other.bos_token_id is None


def _forced_walk(ll: LLTokenizer, tokenizer: Tokenizer, decision: Decision) -> list[int]:
    """The answer as the device produces it: forced tokens from the grammar, one chosen token at every field."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(TASK.output), overrides={"whitespace_flexible": False})
    matcher = LLMatcher(ll, grammar)
    ids: list[int] = []
    for field in TASK.output_fields:
        ids += _consume_forced(matcher)
        value = decision[field.name]
        text = str(value).lower() if isinstance(value, bool) else value
        chosen = int(tokenizer.token_to_id(text))
        assert matcher.consume_token(chosen), (field.name, text, matcher.get_error())
        ids.append(chosen)
    ids += _consume_forced(matcher)
    assert matcher.is_accepting()
    return ids


def _consume_forced(matcher: LLMatcher) -> list[int]:
    forced = list(matcher.compute_ff_tokens())
    assert matcher.consume_tokens(forced), matcher.get_error()
    return forced


def test_forced_tokens_and_chosen_values_are_the_tokens_of_training(tokenizer: Tokenizer) -> None:
    ll = LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=tokenizer.token_to_id(EOS))
    answers = {canonical_answer(row.decision): row.decision for row in islice(generate("train", 8), 300)}
    for text, decision in answers.items():
        assert _forced_walk(ll, tokenizer, decision) == _ids(tokenizer, text)


def test_prompt_fits_the_limit_of_the_task(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, TASK)
    longest = max(len(encoder.prompt(row)) for split in ("train", "test") for row in islice(generate(split, 1), 2000))
    assert longest <= TASK.limits.max_prompt_tokens
    assert len(_ids(tokenizer, TASK.prompt.prefix)) <= 20


def test_enum_fields_open_and_close_with_single_tokens(tokenizer: Tokenizer) -> None:
    assert all(isinstance(field, EnumField | BoolField) for field in TASK.output_fields)
    for seam in ('{"', '":"', '","', '":', ',"', '"}'):
        assert len(_ids(tokenizer, seam)) == 1, seam


def test_tokenizer_is_a_function_of_its_texts() -> None:
    texts = [TASK.render(row.event) for row in islice(generate("train", 2), 300)]
    assert train_tokenizer(texts, vocabulary_size=600).to_str() == train_tokenizer(texts, vocabulary_size=600).to_str()
