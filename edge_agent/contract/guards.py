"""Guards: rules of a task that override the model and are named in the decision when they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import MinLen

from edge_agent.contract.document import Strict
from edge_agent.contract.event import Event, Scalar
from edge_agent.contract.output import EnumField, Identifier, IntField, OutputField


@dataclass(frozen=True, kw_only=True)
class Condition(Strict):
    """True when the event's field matches: give exactly one of ``equals``, ``in`` or ``contains``."""

    event: str
    equals: Scalar = None
    one_of: tuple[Scalar, ...] | None = None
    contains: str | None = None

    # In a file it is `in`, which is no name for a field in Python.
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        **Strict.__pydantic_config__,
        "alias_generator": lambda name: "in" if name == "one_of" else name,
    }

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.equals, self.one_of, self.contains)) != 1:
            raise ValueError("a condition needs exactly one of: equals, in, contains")

    def holds(self, event: Event) -> bool:
        """Whether ``event`` satisfies this condition; strings are compared without case."""
        value = _fold(event.get(self.event))
        if self.contains is not None:
            return isinstance(value, str) and self.contains.casefold() in value
        if self.one_of is not None:
            return value in {_fold(v) for v in self.one_of}
        return value == _fold(self.equals)


@dataclass(frozen=True, kw_only=True)
class Effect(Strict):
    """What a guard enforces on one field: an exact value, or (for enums and integers) a floor."""

    equals: Scalar = None
    at_least: str | int | None = None

    def __post_init__(self) -> None:
        if (self.equals is None) == (self.at_least is None):
            raise ValueError("an effect needs exactly one of: equals, at_least")


@dataclass(frozen=True, kw_only=True)
class Guard(Strict):
    """A rule that overrides the model. Guards run last and are named in the decision when they change it."""

    name: Identifier
    when: Annotated[tuple[Condition, ...], MinLen(1)]
    then: Annotated[dict[str, Effect], MinLen(1)]


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
