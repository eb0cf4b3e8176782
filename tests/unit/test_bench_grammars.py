"""An engine must not be fast or slow because its grammar allows something else than ours."""

from __future__ import annotations

import itertools
import json
import re

import llguidance
import pytest

from edge_agent.contract.output import BoolField, EnumField, OutputField, TextField
from tests.bench.answer_grammars import gbnf, regex

KIND = EnumField(name="kind", values=("belt", 'a "b"', "c.d"))
FIELDS: list[OutputField] = [KIND, BoolField(name="is_late")]


def answers() -> list[str]:
    """All answers that the fields allow."""
    return [
        json.dumps({"kind": kind, "is_late": late}, separators=(",", ":"))
        for kind, late in itertools.product(KIND.values, [True, False])
    ]


def test_the_grammar_of_llama_cpp_lists_every_value_and_no_space() -> None:
    assert gbnf(FIELDS) == (
        r'root ::= "{\"kind\":" kind ",\"is_late\":" is-late "}"'
        "\n"
        r'kind ::= "\"belt\"" | "\"a \\\"b\\\"\"" | "\"c.d\""'
        "\n"
        r'is-late ::= "true" | "false"'
        "\n"
    )


def test_the_expression_of_onnxruntime_genai_matches_every_answer() -> None:
    assert all(re.fullmatch(regex(FIELDS), answer) for answer in answers())


@pytest.mark.parametrize(
    "other",
    [
        '{"kind": "belt","is_late":true}',
        '{"is_late":true,"kind":"belt"}',
        '{"kind":"cxd","is_late":true}',
        '{"kind":"belt","is_late":true}\n',
        '{"kind":"belt"}',
    ],
)
def test_the_expression_matches_no_space_no_other_order_and_no_other_value(other: str) -> None:
    assert not re.fullmatch(regex(FIELDS), other)


def test_the_grammar_engine_takes_the_expression_and_forces_all_but_the_choices() -> None:
    grammar = llguidance.LLMatcher.grammar_from_regex(regex(FIELDS))
    assert not llguidance.LLMatcher.validate_grammar(grammar)


@pytest.mark.parametrize("write", [gbnf, regex])
def test_a_field_without_a_list_of_values_is_refused(write: object) -> None:
    assert callable(write)
    with pytest.raises(ValueError, match="'note' has no list of values"):
        write([TextField(name="note", max_length=10)])
