"""The one way to write an answer, in each peer's language: compact JSON in schema order, no space to choose about."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from edge_agent.contract.output import BoolField, EnumField, OutputField


def gbnf(fields: Sequence[OutputField]) -> str:
    """For llama.cpp: a rule an answer, a rule a field.

    Raises:
        ValueError: a field without finitely many values.
    """
    rules = {f.name.replace("_", "-"): " | ".join(_gbnf_text(value) for value in _spelled(f)) for f in fields}
    names = iter(rules)
    root = " ".join(f"{_gbnf_text(literal)} {next(names)}" for literal in _keys(fields))
    return "\n".join([f'root ::= {root} "}}"', *(f"{name} ::= {values}" for name, values in rules.items())]) + "\n"


def regex(fields: Sequence[OutputField]) -> str:
    """For onnxruntime-genai: one expression, which its grammar engine takes as a single lexeme.

    Raises:
        ValueError: a field without finitely many values.
    """
    values = iter("|".join(re.escape(value) for value in _spelled(field)) for field in fields)
    return "".join(f"{re.escape(literal)}({next(values)})" for literal in _keys(fields)) + re.escape("}")


def _keys(fields: Sequence[OutputField]) -> Iterator[str]:
    """What stands before each value."""
    for position, field in enumerate(fields):
        yield f"{',' if position else '{'}{json.dumps(field.name)}:"


def _spelled(field: OutputField) -> list[str]:
    """All values of a field as JSON writes them."""
    match field:
        case EnumField():
            return [json.dumps(value, ensure_ascii=False) for value in field.values]
        case BoolField():
            return ["true", "false"]
    raise ValueError(f"field {field.name!r} has no list of values")


def _gbnf_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
