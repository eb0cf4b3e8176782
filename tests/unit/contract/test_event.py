"""Events as hostile senders write them."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.event import MAX_FIELDS, clean_text, event_id, parse_event
from edge_agent.errors import RefusedError


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "event.not_json"),
        (b"{", "event.not_json"),
        (b"[" * 100_000, "event.too_large"),
        (b"[" * 60_000, "event.not_json"),
        (b'{"value": Infinity}', "event.not_json"),
        (b'{"value": 1e999}', "event.bad_field"),
        (b"null", "event.not_object"),
        (b'"text"', "event.not_object"),
        (b"{}", "event.empty"),
        (b'{"a": [1]}', "event.bad_field"),
        (b'{"a": {"b": 1}}', "event.bad_field"),
        (b'{"a": "\xff"}', "event.not_utf8"),
        (json.dumps({f"f{n}": n for n in range(MAX_FIELDS + 1)}).encode(), "event.bad_field"),
        (b'{"n": ' + b"9" * 5000 + b"}", "event.not_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_event_that_could_not_be_decided_is_refused_with_its_code(raw: bytes, code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_event(raw)
    assert caught.value.code == code


@given(st.binary(max_size=400))
def test_no_bytes_make_the_parser_fail_in_another_way(raw: bytes) -> None:
    try:
        event = parse_event(raw)
    except RefusedError:
        return
    assert event


@given(st.text(max_size=300), st.integers(min_value=1, max_value=80))
def test_clean_text_is_one_bounded_line_without_control_characters(text: str, limit: int) -> None:
    cleaned = clean_text(text, limit)
    assert len(cleaned) <= limit
    assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in cleaned)


def test_a_repeated_event_without_id_keeps_its_identity_whatever_the_order_of_its_fields() -> None:
    assert event_id({"a": 1, "b": "x"}) == event_id({"b": "x", "a": 1}) != event_id({"a": 2, "b": "x"})


@pytest.mark.parametrize("given_id", ["", "   ", None, True, 1.5])
def test_an_id_that_identifies_nothing_is_not_used(given_id: str | float | None) -> None:
    assert event_id({"id": given_id, "text": "x"}).startswith("sha256-")


def test_an_id_with_lone_surrogates_can_still_be_published() -> None:
    identity = event_id(parse_event(rb'{"id": "a\ud800b"}'))
    assert identity.encode("utf-8")


def test_an_endless_id_is_bounded() -> None:
    assert len(event_id({"id": "x" * 100_000})) == 128
