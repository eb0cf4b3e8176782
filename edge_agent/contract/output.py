"""The answer of a task: the supported part of JSON Schema, read into fields that can be decoded one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen, MinLen

from edge_agent.contract.bounds import Matches
from edge_agent.contract.document import DocumentError, Strict, read_document
from edge_agent.errors import PermanentError

MAX_TEXT_CHARS = 512
Identifier = Annotated[str, Matches(r"^[a-z][a-z0-9_]{0,31}$")]


@dataclass(frozen=True, kw_only=True)
class EnumField(Strict):
    """A closed choice. Order matters: guards with ``at_least`` read it as ascending."""

    kind: Literal["enum"] = "enum"
    name: Identifier
    values: Annotated[tuple[str, ...], MinLen(1), MaxLen(256)]


@dataclass(frozen=True, kw_only=True)
class BoolField(Strict):
    """true or false."""

    kind: Literal["boolean"] = "boolean"
    name: Identifier


@dataclass(frozen=True, kw_only=True)
class IntField(Strict):
    """An integer in [minimum, maximum]."""

    kind: Literal["integer"] = "integer"
    name: Identifier
    minimum: int
    maximum: int


@dataclass(frozen=True, kw_only=True)
class TextField(Strict):
    """A string of at most ``max_length`` characters."""

    kind: Literal["string"] = "string"
    name: Identifier
    max_length: Annotated[int, Ge(1), Le(MAX_TEXT_CHARS)]


OutputField = EnumField | BoolField | IntField | TextField


def parse_output_schema(schema: dict[str, Any]) -> tuple[OutputField, ...]:
    """Read the supported part of JSON Schema: a closed object of required scalar properties, in order.

    Args:
        schema: a JSON Schema (2020-12) object.

    Returns:
        The answer's fields in schema order.

    Raises:
        PermanentError: ``task.schema_unsupported`` naming the property and the reason; recursion, unbounded
            strings and open objects are refused here, so that decoding can be valid by construction.
    """

    def refuse(reason: str) -> PermanentError:
        return PermanentError("task.schema_unsupported", reason)

    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, dict) or not properties:
        raise refuse("output schema must be an object with properties")
    if schema.get("additionalProperties", False) is not False:
        raise refuse("output schema must not allow additional properties")
    names = list(properties)
    required = schema.get("required", names)
    # Not as sets: what a person wrote there may be anything, and have no hash.
    if not (isinstance(required, list) and all(one in names and one in required for one in (*names, *required))):
        raise refuse("every property of the output schema must be required")
    return tuple(_output_field(name, spec, refuse) for name, spec in properties.items())


def _output_field(name: str, spec: Any, refuse: Any) -> OutputField:
    if not isinstance(spec, dict) or any(str(key).startswith("$") for key in spec):
        raise refuse(f"property {name!r}: references and recursion are not supported")
    kind = spec.get("type", "string" if "enum" in spec else None)
    try:
        if "enum" in spec:
            values = spec["enum"]
            if kind != "string" or not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
                raise refuse(f"property {name!r}: an enum must list non-empty strings")
            if len(set(values)) != len(values):
                raise refuse(f"property {name!r}: enum values repeat")
            return read_document(EnumField, {"name": name, "values": values})
        if kind == "boolean":
            return read_document(BoolField, {"name": name})
        if kind == "integer":
            low, high = spec.get("minimum"), spec.get("maximum")
            if not isinstance(low, int) or not isinstance(high, int) or low > high:
                raise refuse(f"property {name!r}: an integer needs whole numbers minimum <= maximum")
            return read_document(IntField, {"name": name, "minimum": low, "maximum": high})
        if kind == "string":
            if "maxLength" not in spec:
                raise refuse(f"property {name!r}: a string needs maxLength (at most {MAX_TEXT_CHARS})")
            return read_document(TextField, {"name": name, "max_length": spec["maxLength"]})
    except DocumentError as error:
        raise refuse(f"property {name!r}: {error.faults[0][1]}") from error
    # A few lines of YAML aliases may stand for gigabytes of lists: never spelled out.
    shown = kind[:40] if isinstance(kind, str) else type(kind).__name__
    raise refuse(f"property {name!r}: type {shown!r} is not supported")


def accepts(field: OutputField, value: Any) -> bool:
    """Whether ``value`` is an answer of ``field``."""
    match field:
        case EnumField():
            return value in field.values
        case BoolField():
            return isinstance(value, bool)
        case IntField():
            return isinstance(value, int) and not isinstance(value, bool) and field.minimum <= value <= field.maximum
        case TextField():
            return isinstance(value, str) and len(value) <= field.max_length
