"""Guards: rules of a task that override the model and are named in the decision when they did."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from edge_agent.contract.event import Event, Scalar
from edge_agent.contract.output import EnumField, Identifier, IntField, OutputField
from edge_agent.contract.strict import Strict


class Condition(Strict):
    """True when the event's field matches: give exactly one of ``equals``, ``in`` or ``contains``."""

    event: str
    equals: Scalar = None
    one_of: tuple[Scalar, ...] | None = Field(default=None, alias="in")
    contains: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(x is not None for x in (self.equals, self.one_of, self.contains)) != 1:
            raise ValueError("a condition needs exactly one of: equals, in, contains")
        return self

    def holds(self, event: Event) -> bool:
        """Whether ``event`` satisfies this condition; strings are compared without case."""
        value = _fold(event.get(self.event))
        if self.contains is not None:
            return isinstance(value, str) and self.contains.casefold() in value
        if self.one_of is not None:
            return value in {_fold(v) for v in self.one_of}
        return value == _fold(self.equals)


class Effect(Strict):
    """What a guard enforces on one field: an exact value, or (for enums and integers) a floor."""

    equals: Scalar = None
    at_least: str | int | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.equals is None) == (self.at_least is None):
            raise ValueError("an effect needs exactly one of: equals, at_least")
        return self


class Guard(Strict):
    """A rule that overrides the model. Guards run last and are named in the decision when they change it."""

    name: Identifier
    when: tuple[Condition, ...] = Field(min_length=1)
    then: dict[str, Effect] = Field(min_length=1)


PREFIX_ECHO = "prefix_echo"
"""Name of the guard that every task with free text has."""
ECHO_CHARS = 40
"""A shorter run of the same characters may be chance, or the name of a part."""


def echoes(text: str, prefix: str) -> bool:
    """Whether free text repeats the task's instruction, as an event may order a model to do.

    Args:
        text: a value of the answer.
        prefix: the task's own, which no event may bring to light.
    """
    said, secret = (" ".join(part.casefold().split()) for part in (text, prefix))
    return any(said[at : at + ECHO_CHARS] in secret for at in range(len(said) - ECHO_CHARS + 1))


def enforce(field: OutputField, effect: Effect, current: Any) -> Any:
    """The value of ``field`` after ``effect``."""
    if effect.at_least is None:
        return effect.equals
    if isinstance(field, EnumField):
        floor = field.values.index(str(effect.at_least))
        return field.values[max(floor, field.values.index(current))]
    if isinstance(field, IntField):
        return max(int(effect.at_least), current)
    return effect.at_least


def _fold(value: Scalar) -> Scalar:
    return value.casefold().strip() if isinstance(value, str) else value
