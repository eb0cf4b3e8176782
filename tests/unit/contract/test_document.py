"""Two readers of one document: where the plain one says yes, pydantic would have said the very same."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge, Le, MinLen, Predicate
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from edge_agent.contract.bounds import Matches
from edge_agent.contract.document import DocumentError, Strict, read_document, to_document, to_json
from edge_agent.contract.manifest import Manifest
from edge_agent.contract.plain_reader import DoubtError, plain_reader
from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.contract.thresholds import ChosenFloor
from edge_agent.errors import EdgeError
from edge_agent.runtime.calibration import Knots

BUNDLE = Path(__file__).parents[3] / "export/reference/bundle"
TASK: dict[str, Any] = yaml.safe_load((BUNDLE / "tasks/triage/task.yaml").read_text("utf-8"))
EVERYTHING: dict[str, Any] = {
    **TASK,
    "thresholds": {
        "severity": {"max_wrong": 0.01, "certainty": 0.9},
        "category": {"escalate": 1, "abstain": 0.5},
        "action": 1,
    },
    "guards": [
        {"name": "fire", "when": [{"event": "code", "equals": "FIRE"}], "then": {"severity": {"at_least": "high"}}},
        {"name": "two", "when": [{"event": "code", "in": ["a", 1, None]}], "then": {"escalate": {"equals": True}}},
    ],
    "escalation": {"to": "http", "timeout_s": 30, "share": ["text", "machine"], "hint": True},
    "handoff": [{"when": {"category": ["hydraulic"], "escalate": [True]}, "to": "fluids"}],
    "veto": {"task": "check", "when": {"safe": [False]}, "min_confidence": 0, "abstain": True},
}
FLOOR = {"max_wrong": 0.01, "certainty": 0.95, "floor": 1, "events": 10, "passed": 9, "wrong": 0, "over": ["a"]}
DOCUMENTS: list[tuple[type, dict[str, Any]]] = [
    (TaskSpec, EVERYTHING),
    (Manifest, json.loads((BUNDLE / "manifest.json").read_bytes())),
    (GoldenExample, {"event": {"a": 1, "b": 1.5, "c": None, "d": True}, "decision": {"e": "x"}}),
    (ChosenFloor, FLOOR),
    (Knots, {"raw": [0, 0.5, 1], "right": [0.0, 0.4, 1]}),
]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 17, 1 << 60, 10**400, 0.0, 1.0, 0.5, -0.5, 1e300, math.nan, math.inf, "", "a", "1",
    "0.5", "true", "device", "info", "\ud800", "é", "a\n", "../x", "x" * 5000, b"a", (), ("a",), [], ["a"], [None],
    [1, "a"], {}, {"a": 1}, {1: "a"}, {"when": []}, {"max_wrong": "0.5"}, {"escalate": 0.5},
]  # fmt: skip


def places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a document."""
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield (*here, key)
        yield from places(document[key], (*here, key))


def changed(document: dict[str, Any], place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    made = copy.deepcopy(document)
    part: Any = made
    for key in place[:-1]:
        part = part[key]
    change(part, place[-1])
    return made


@st.composite
def almost_right(draw: st.DrawFn) -> tuple[type, dict[str, Any]]:
    """A document with up to two values replaced, removed, or joined by a stranger."""
    kind, document = draw(st.sampled_from(DOCUMENTS))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(list(places(document))))
        value = draw(st.sampled_from(ODD))

        def replace(part: Any, key: Any, value: Any = value) -> None:
            part[key] = copy.copy(value)

        def remove(part: Any, key: Any) -> None:
            del part[key]

        def join(part: Any, _key: Any, value: Any = value) -> None:
            part.update(stranger=value) if isinstance(part, dict) else part.append(value)

        changes: list[Callable[[Any, Any], None]] = [replace, remove, join]
        document = changed(document, place, draw(st.sampled_from(changes)))
    return kind, document


def judged(kind: type, document: object) -> str:
    """What pydantic says alone: the value with every type in it, or that there is a fault."""
    try:
        return repr(TypeAdapter(kind).validate_python(document))
    except (ValidationError, UnicodeError):
        return "fault"
    except EdgeError as error:
        return type(error).__name__


@given(almost_right())
def test_what_the_plain_reader_vouches_for_is_what_pydantic_reads(made: tuple[type, dict[str, Any]]) -> None:
    kind, document = made
    try:
        plain = repr(plain_reader(kind)(document))
    except (DoubtError, ValueError):
        return
    except EdgeError as error:
        plain = type(error).__name__
    assert plain == judged(kind, document)


@given(almost_right())
def test_whoever_reads_it_a_document_is_read_as_pydantic_reads_it(made: tuple[type, dict[str, Any]]) -> None:
    kind, document = made
    expected = judged(kind, document)
    try:
        found = repr(read_document(kind, document))
    except DocumentError:
        found = "fault"
    except EdgeError as error:
        found = type(error).__name__
    assert found == expected


@pytest.mark.parametrize(("kind", "document"), DOCUMENTS)
def test_a_plain_document_needs_no_judge_and_survives_being_written(kind: type, document: dict[str, Any]) -> None:
    read = plain_reader(kind)(document)
    assert repr(plain_reader(kind)(to_document(read))) == repr(read)
    assert repr(plain_reader(kind)(json.loads(to_json(read)))) == repr(read)


@dataclass(frozen=True, kw_only=True)
class Part(Strict):
    name: Annotated[str, Matches(r"^[a-z]+$")]
    count: Annotated[int, Ge(1), Le(9)] = 1


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: Annotated[tuple[Part, ...], MinLen(1)]
    size: float = 1.0
    colour: Literal["red", "green"] = "red"
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size > 100:
            raise ValueError(f"size {self.size:g} is too large")


def test_every_fault_of_a_document_is_told_with_its_place() -> None:
    with pytest.raises(DocumentError) as caught:
        read_document(Whole, {"parts": [{"name": "A", "count": 0, "hue": 1}, {}, 3], "colour": "blue"})
    places_of_faults = [place for place, _ in caught.value.faults]
    assert {"parts.0.name", "parts.0.count", "parts.0.hue", "parts.1.name", "colour"} <= set(places_of_faults)
    assert "parts.0.hue: Extra inputs are not permitted" in str(caught.value)
    assert "parts.2: Input should be a mapping of keys to values" in str(caught.value)


def test_a_fault_of_the_whole_is_told_in_its_own_words() -> None:
    with pytest.raises(DocumentError) as caught:
        read_document(Whole, {"parts": [{"name": "a"}], "size": 101})
    assert caught.value.sentence("box") == "box: Value error, size 101 is too large"


def test_a_fault_that_quotes_half_a_character_is_a_fault_like_any_other() -> None:
    # JSON can spell half of a character that takes two.
    with pytest.raises(DocumentError, match="surrogate"):
        read_document(Manifest, {**DOCUMENTS[1][1], "tasks": ["\ud800"]})


def test_what_is_written_carelessly_is_converted_as_ever() -> None:
    found = read_document(Whole, {"parts": [{"name": "a", "count": "3"}], "size": "2", "unknown": 1})
    assert found == Whole(parts=(Part(name="a", count=3),), size=2.0)


@pytest.mark.parametrize("kind", [set[int], tuple[int, int], Annotated[int, Predicate(bool)], complex])
def test_a_type_or_bound_that_nobody_checks_is_a_mistake_in_the_code(kind: Any) -> None:
    with pytest.raises(TypeError, match="documents"):
        plain_reader(kind)
