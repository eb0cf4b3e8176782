"""A task: how an event becomes a prompt, which answers exist, and what is done when the model is unsure.

A task is the file an OT engineer edits (``tasks/<name>/task.yaml`` with ``golden.jsonl`` beside it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le, MaxLen, MinLen

from edge_agent.contract.bounds import Forms, Matches
from edge_agent.contract.document import DocumentError, Strict, read_document, read_json
from edge_agent.contract.escalation import EscalationSpec
from edge_agent.contract.event import Event, Scalar, check_event, clean_text
from edge_agent.contract.guards import PREFIX_ECHO, Guard, echoes, enforce
from edge_agent.contract.output import Identifier, OutputField, TextField, accepts, parse_output_schema
from edge_agent.contract.routing import Handoff, Veto, check_effects
from edge_agent.contract.thresholds import Threshold
from edge_agent.errors import PermanentError, RefusedError

Label = Annotated[str, Matches(r"^[^\s:][^\n:]{0,23}$")]


@dataclass(frozen=True, kw_only=True)
class EventField(Strict):
    """One line of the rendered event: ``label: value``."""

    field: str
    label: Label
    max_chars: Annotated[int, Ge(1), Le(4000)] = 64


@dataclass(frozen=True, kw_only=True)
class Deviation(Strict):
    """A line computed on the device: by how many percent ``value`` lies beyond ``limit`` (signed, rounded).

    Arithmetic belongs in code: a small model reads "+35 %" far more reliably than it compares two decimals.
    """

    deviation: str
    limit: str
    label: Label


def _form(value: Any) -> str:
    is_deviation = isinstance(value, Deviation) or (isinstance(value, Mapping) and "deviation" in value)
    return "deviation" if is_deviation else "field"


EventLine = Annotated[EventField | Deviation, Forms((("field", EventField), ("deviation", Deviation)), _form)]


@dataclass(frozen=True, kw_only=True)
class Prompt(Strict):
    """Prefix (cached once per model), event lines ordered from stable to volatile, and the answer cue."""

    prefix: Annotated[str, MinLen(1), MaxLen(4000)]
    event: Annotated[tuple[EventLine, ...], MinLen(1)]
    suffix: Annotated[str, MinLen(1), MaxLen(64)] = "answer: "
    on_overlong: Literal["truncate", "refuse"] = "truncate"


@dataclass(frozen=True, kw_only=True)
class Limits(Strict):
    """Bounds of one decision."""

    max_event_bytes: Annotated[int, Ge(64), Le(1_048_576)] = 16_384
    max_prompt_tokens: Annotated[int, Ge(16), Le(8192)] = 256


@dataclass(frozen=True, kw_only=True)
class GoldenExample(Strict):
    """An event with the answer that every acceptable model must give."""

    event: dict[str, Scalar]
    decision: dict[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class TaskSpec(Strict):
    """One task, checked as a whole.

    Args:
        cache: answer an event that was answered before from memory.
        escalation: absent: unsure answers stay on the device.

    Raises:
        ValueError: the parts contradict each other; `load_task` makes it ``task.invalid``.
        PermanentError: ``task.schema_unsupported``.
    """

    format: Literal[1] = 1
    name: Identifier
    version: Annotated[int, Ge(1)]
    description: str = ""
    prompt: Prompt
    output: dict[str, Any]
    thresholds: dict[str, Threshold] = dataclasses.field(default_factory=dict)
    deadline_ms: Annotated[int, Ge(10), Le(600_000)] = 2000
    priority: Literal["safety", "normal", "bulk"] = "normal"
    limits: Limits = Limits()
    cache: bool = True
    guards: tuple[Guard, ...] = ()
    escalation: EscalationSpec | None = None
    handoff: tuple[Handoff, ...] = ()
    veto: Veto | None = None

    def __post_init__(self) -> None:
        fields = {f.name: f for f in self.output_fields}
        for name in self.thresholds:
            if name not in fields:
                raise ValueError(f"threshold for unknown field {name!r}")
        for guard in self.guards:
            check_effects(f"guard {guard.name!r}", fields, guard.then)
        if self.veto is not None:
            check_effects("the veto", fields, self.veto.then)

    @cached_property
    def output_fields(self) -> tuple[OutputField, ...]:
        """The answer's fields in the order in which they are decoded."""
        return parse_output_schema(self.output)

    def render(self, event: Event) -> str:
        """The text that follows the cached prefix: one line a present field, then the answer cue.

        Raises:
            RefusedError: ``event.no_known_field`` when no field of the template is in the event.
        """
        lines: list[str] = []
        for item in self.prompt.event:
            text = _deviation_percent(item, event) if isinstance(item, Deviation) else _field_text(item, event)
            if text:
                lines.append(f"{item.label}: {text}\n")
        if not lines:
            raise RefusedError("event.no_known_field", f"event has none of the fields that task {self.name!r} reads")
        return "".join(lines) + self.prompt.suffix

    def check_decision(self, decision: dict[str, Any]) -> list[str]:
        """Reasons why ``decision`` is not an answer of this task; empty when it is valid."""
        fields = {f.name: f for f in self.output_fields}
        problems = [f"unknown field {name!r}" for name in decision if name not in fields]
        for name, field in fields.items():
            if name not in decision:
                problems.append(f"field {name!r} is missing")
            elif not accepts(field, decision[name]):
                problems.append(f"field {name!r} cannot be {decision[name]!r}")
        return problems

    def apply_guards(self, event: Event, decision: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Empty text that repeats the task's prefix, then run every guard in order.

        Returns:
            The decision after all guards, and the names of those that changed it.
        """
        fields = {f.name: f for f in self.output_fields}
        result = dict(decision)
        changed: list[str] = []
        for name, field in fields.items():
            if isinstance(field, TextField) and echoes(result[name], self.prompt.prefix):
                result[name] = ""
                changed = [PREFIX_ECHO]
        for guard in self.guards:
            if not all(condition.holds(event) for condition in guard.when):
                continue
            before = dict(result)
            for name, effect in guard.then.items():
                result[name] = enforce(fields[name], effect, result[name])
            if result != before:
                changed.append(guard.name)
        return result, changed


def load_task(path: Path) -> TaskSpec:
    """Read ``task.yaml``.

    Raises:
        PermanentError: ``task.unreadable`` or ``task.invalid``, listing every fault found.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError("task.unreadable", f"cannot read task file: {error}", path=str(path)) from error
    return parse_task(text, source=str(path))


def parse_task(text: str, *, source: str = "task.yaml") -> TaskSpec:
    """Parse the text of a task file (raises as `load_task`)."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # The library lets through what its constructors raise: a 13th month, an integer of 5000 digits.
        raise PermanentError("task.invalid", f"not valid YAML: {error}", path=source) from error
    try:
        return read_document(TaskSpec, document)
    except DocumentError as error:
        raise PermanentError("task.invalid", error.sentence("task"), path=source) from error


def load_golden(path: Path, task: TaskSpec) -> tuple[GoldenExample, ...]:
    """Read ``golden.jsonl`` and check every example against the task's own schema.

    Raises:
        PermanentError: ``task.golden_invalid`` with the line number.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError("task.golden_invalid", f"cannot read golden examples: {error}", path=str(path)) from error
    examples: list[GoldenExample] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = read_json(GoldenExample, line)
            check_event(dict(example.event))
        except (DocumentError, RefusedError) as error:
            raise PermanentError("task.golden_invalid", f"line {number}: {error}", path=str(path)) from error
        if problems := task.check_decision(dict(example.decision)):
            raise PermanentError("task.golden_invalid", f"line {number}: {'; '.join(problems)}", path=str(path))
        examples.append(example)
    return tuple(examples)


def _field_text(item: EventField, event: Event) -> str:
    value = event.get(item.field)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return clean_text(str(value), item.max_chars)


def _deviation_percent(item: Deviation, event: Event) -> str:
    value, limit = event.get(item.deviation), event.get(item.limit)
    if isinstance(value, bool) or isinstance(limit, bool):
        return ""
    if not (isinstance(value, int | float) and isinstance(limit, int | float)) or limit == 0:
        return ""
    try:
        percent = round((value - limit) / abs(limit) * 100)
    except OverflowError:  # beyond a double: the sign is all that the clamp would have kept
        percent = 999 if value > limit else -999
    return f"{max(-999, min(999, percent)):+d} %"
