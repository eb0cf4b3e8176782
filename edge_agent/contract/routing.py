"""Who else has a word in a task's answer: a specialist that answers some fields better, and a check that may veto.

A task that hands off is a *router*: its own answer says which specialist sees the event. A specialist answers some of
the router's fields, so that what is published always satisfies the router's own schema. Everything is declared in the
router's ``task.yaml``; all tasks are tasks of one bundle.

Hand-offs are one deep: who is handed an event hands it to nobody, and neither specialists nor checks veto. So the most
that one event can cost is three tasks, and no declaration can run in circles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from edge_agent.contract.document import Strict
from edge_agent.contract.guards import Effect
from edge_agent.contract.output import EnumField, Identifier, IntField, OutputField, TextField, accepts
from edge_agent.errors import PermanentError

if TYPE_CHECKING:
    from edge_agent.contract.task import TaskSpec

Route = Literal["device", "cache", "rule", "escalated", "abstained"]
"""Who had the last word in a published decision."""
Answers = Annotated[tuple[bool | int | str, ...], MinLen(1)]
When = Annotated[dict[Identifier, Answers], MinLen(1)]
"""Field to the values that match; every field must match. Text cannot be matched: it is not a choice."""


@dataclass(frozen=True, kw_only=True)
class Handoff(Strict):
    """Hand the event to ``to`` when the router's own answer matches."""

    when: When
    to: Identifier


@dataclass(frozen=True, kw_only=True)
class Veto(Strict):
    """Ask ``task`` about the event, and let its answer overrule the decision.

    ``then`` sets fields as guards do; ``abstain`` leaves the whole decision to somebody else. A check that is less sure
    than ``min_confidence`` of a passing answer (of any field in ``when``) counts as not answered; a veto counts however
    unsure it is. So doubt never lets a decision through.
    """

    task: Identifier
    when: When
    min_confidence: Annotated[float, Ge(0), Le(1)] = 0.0
    then: dict[str, Effect] = dataclasses.field(default_factory=dict)
    abstain: bool = False

    def __post_init__(self) -> None:
        if bool(self.then) == self.abstain:
            raise ValueError("a veto needs exactly one of: then, abstain")


def matches(when: Mapping[str, Sequence[Any]], answer: Mapping[str, Any]) -> bool:
    """Whether ``answer`` has one of the listed values in every field of ``when``."""
    # By type too: in Python 1 equals true.
    return all(
        any(type(value) is type(answer[name]) and value == answer[name] for value in values)
        for name, values in when.items()
    )


def check_effects(owner: str, fields: Mapping[str, OutputField], then: Mapping[str, Effect]) -> None:
    """Refuse effects on fields or values that the task does not have.

    Args:
        owner: who sets them, for the sentence: ``guard 'estop'``.
        fields: the task's own.
        then: field to effect.

    Raises:
        ValueError: becomes ``task.invalid``.
    """
    for name, effect in then.items():
        if name not in fields:
            raise ValueError(f"{owner} sets unknown field {name!r}")
        wanted = effect.equals if effect.at_least is None else effect.at_least
        if not accepts(fields[name], wanted):
            raise ValueError(f"{owner}: {wanted!r} is not a value of {name!r}")


def check_routing(tasks: Mapping[str, TaskSpec]) -> None:
    """Refuse a bundle whose tasks name each other in a way that cannot be followed.

    Args:
        tasks: all tasks of the bundle, by name.

    Raises:
        PermanentError: ``task.routing_invalid``, listing every fault found.
    """
    faults = [f"task {name!r}: {fault}" for name, task in tasks.items() for fault in _faults(name, task, tasks)]
    if faults:
        raise PermanentError("task.routing_invalid", "; ".join(faults))


def _faults(name: str, task: TaskSpec, tasks: Mapping[str, TaskSpec]) -> Iterator[str]:
    for rule in task.handoff:
        yield from _when_faults("handoff", rule.when, task)
        if rule.to == name:
            yield "it hands events to itself"
        elif rule.to not in tasks:
            yield f"it hands events to {rule.to!r}, which is not in the bundle"
        else:
            specialist = tasks[rule.to]
            if specialist.handoff or specialist.veto is not None:
                yield f"specialist {rule.to!r} hands off or vetoes itself: routing is one deep"
            yield from _field_faults(task, specialist)
    if task.veto is None:
        return
    check = tasks.get(task.veto.task)
    if task.veto.task == name:
        yield "it vetoes itself"
    elif check is None:
        yield f"its veto asks {task.veto.task!r}, which is not in the bundle"
    else:
        if check.handoff or check.veto is not None:
            yield f"check {check.name!r} hands off or vetoes itself: routing is one deep"
        yield from _when_faults("veto", task.veto.when, check)


def _when_faults(part: str, when: Mapping[str, Sequence[Any]], asked: TaskSpec) -> Iterator[str]:
    fields = {field.name: field for field in asked.output_fields}
    for name, values in when.items():
        if name not in fields:
            yield f"{part}: {asked.name!r} answers no field {name!r}"
        elif isinstance(fields[name], TextField):
            yield f"{part}: {name!r} is text, which is not a choice"
        else:
            yield from (
                f"{part}: {value!r} is not an answer of {name!r}"
                for value in values
                if not accepts(fields[name], value)
            )


def _field_faults(router: TaskSpec, specialist: TaskSpec) -> Iterator[str]:
    known = {field.name: field for field in router.output_fields}
    for field in specialist.output_fields:
        if field.name not in known:
            yield f"specialist {specialist.name!r} answers {field.name!r}, which the router does not"
        elif not _is_part_of(field, known[field.name]):
            yield f"specialist {specialist.name!r} may answer {field.name!r} with what the router cannot"


def _is_part_of(field: OutputField, whole: OutputField) -> bool:
    """Whether every value of ``field`` is one of ``whole``."""
    match field, whole:
        case EnumField(), EnumField():
            return set(field.values) <= set(whole.values)
        case IntField(), IntField():
            return whole.minimum <= field.minimum and field.maximum <= whole.maximum
        case TextField(), TextField():
            return field.max_length <= whole.max_length
        case _:
            return field.kind == whole.kind
