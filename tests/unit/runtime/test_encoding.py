"""Text is only ever text, and what does not fit is cut visibly or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.contract.document import read_document
from edge_agent.contract.event import Event
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.prompt import event_prompt
from tests.fakes import tokenizers
from tests.fakes.hostile_texts import HOSTILE_TEXTS, SCRIPTS

VOCAB = 512


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"), VOCAB)


def task_with(limit: int = 64, on_overlong: str = "truncate", max_chars: int = 4000) -> TaskSpec:
    prompt: dict[str, Any] = {
        "prefix": "p",
        "event": [
            {"field": "machine", "label": "machine", "max_chars": 40},
            {"field": "value", "label": "value"},
            {"deviation": "value", "limit": "limit", "label": "over"},
            {"field": "text", "label": "text", "max_chars": max_chars},
        ],
        "on_overlong": on_overlong,
    }
    return read_document(
        TaskSpec,
        {
            "name": "task",
            "version": 1,
            "prompt": prompt,
            "output": {"type": "object", "properties": {"a": {"type": "boolean"}}},
            "limits": {"max_prompt_tokens": limit, "max_event_bytes": 20_000},
        },
    )


@pytest.mark.parametrize("token", [*tokenizers.SPECIAL, "<|im_start|>system"])
def test_special_token_in_text_is_its_characters(encoder: TextEncoder, token: str) -> None:
    ids = encoder.encode(token)
    assert len(ids) > 3
    assert encoder.control_ids.isdisjoint(ids)
    assert encoder.decode(ids) == token


def test_added_token_that_the_file_does_not_call_special_is_its_characters_too(tmp_path: Path) -> None:
    path = tokenizers.with_plain_added_token(tmp_path / "tokenizer.json", "<tool_call>")
    encoder = TextEncoder(path, VOCAB)
    assert encoder.decode(encoder.encode("a<tool_call>b")) == "a<tool_call>b"
    assert len(encoder.encode("<tool_call>")) > 3


def test_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tokenizers.byte_level(tmp_path / "tokenizer.json")
    with pytest.raises(PermanentError) as caught:
        TextEncoder(path, 100)
    assert caught.value.code == "bundle.unsupported"


def test_text_that_is_no_unicode_is_an_error_of_ours(encoder: TextEncoder) -> None:
    with pytest.raises(PermanentError) as caught:
        encoder.encode("a\ud800b")
    assert caught.value.code == "tokenizer.failed"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=300), limit=st.integers(24, 80))
def test_any_text_fits_the_limit_with_the_cue_at_its_end(encoder: TextEncoder, text: str, limit: int) -> None:
    event: Event = {"machine": "m", "text": text}
    prompt = event_prompt(task_with(limit), event, encoder.encode)
    assert len(prompt.ids) <= limit
    assert encoder.control_ids.isdisjoint(prompt.ids)
    shown = encoder.decode(prompt.ids)
    assert shown.startswith("machine: m\n")
    assert shown.endswith("\nanswer: ")
    assert shown.count("\n") <= 2
    if not prompt.truncated:
        assert shown == task_with(limit).render(event)


@pytest.mark.parametrize("text", [*HOSTILE_TEXTS.values(), *SCRIPTS.values()], ids=[*HOSTILE_TEXTS, *SCRIPTS])
def test_hostile_text_stays_on_its_line(encoder: TextEncoder, text: str) -> None:
    prompt = event_prompt(task_with(48), {"machine": "m", "text": text}, encoder.encode)
    shown = encoder.decode(prompt.ids)
    assert shown.startswith("machine: m\n")
    assert shown.endswith("\nanswer: ")
    assert shown.count("\n") <= 2


def test_cut_keeps_as_much_of_the_longest_text_as_fits(encoder: TextEncoder) -> None:
    event: Event = {"machine": "press-4", "value": 7, "text": "x" * 300}
    prompt = event_prompt(task_with(64), event, encoder.encode)
    assert prompt.truncated
    assert 60 <= len(prompt.ids) <= 64
    shown = encoder.decode(prompt.ids)
    assert "machine: press-4\nvalue: 7\ntext: xxx" in shown


def test_longest_is_counted_in_tokens_so_that_a_name_is_not_cut_for_a_rare_script(encoder: TextEncoder) -> None:
    event: Event = {"machine": "press-4", "text": "0»¼𝠀"}
    shown = encoder.decode(event_prompt(task_with(24), event, encoder.encode).ids)
    assert shown.startswith("machine: press-4\n")


def test_when_the_longest_text_is_not_enough_the_next_one_is_cut(encoder: TextEncoder) -> None:
    event: Event = {"machine": "漢" * 39, "text": "字" * 100}  # three bytes, three tokens each
    prompt = event_prompt(task_with(40), event, encoder.encode)
    shown = encoder.decode(prompt.ids)
    assert prompt.truncated
    assert "text" not in shown
    assert shown.startswith("machine: 漢")


def test_event_that_cannot_be_cut_to_fit_is_refused(encoder: TextEncoder) -> None:
    task = task_with(16)
    with pytest.raises(RefusedError) as caught:
        event_prompt(task, {"value": 10**60, "limit": 3}, encoder.encode)
    assert caught.value.code == "event.too_long"
    with pytest.raises(RefusedError) as caught:
        event_prompt(task_with(16), {"text": "🔥" * 50, "value": 123456789, "limit": 1}, encoder.encode)
    assert caught.value.code == "event.too_long"


def test_overlong_event_is_refused_where_the_task_says_so(encoder: TextEncoder) -> None:
    with pytest.raises(RefusedError) as caught:
        event_prompt(task_with(32, "refuse"), {"text": "x" * 300}, encoder.encode)
    assert (caught.value.code, caught.value.context["tokens"] > 32) == ("event.too_long", True)


@pytest.mark.parametrize(
    ("event", "cut"),
    [
        ({"text": "x" * 10}, False),
        ({"text": "x" * 11}, True),
        ({"text": " x " * 4}, False),
        ({"text": "x" + " " * 500}, False),
        ({"text": "ﷺ"}, True),
        ({"value": 10**70}, True),
        ({"value": 10**60}, False),
    ],
    ids=["fits", "one-too-many", "spaces", "long-but-blank", "expands", "long-integer", "integer"],
)
def test_a_template_that_cuts_says_so(encoder: TextEncoder, event: Event, *, cut: bool) -> None:
    assert event_prompt(task_with(512, max_chars=10), event, encoder.encode).truncated is cut
