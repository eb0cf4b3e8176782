"""Below which confidence a field is not trusted: a number of the task's, or a share of wrong values it must keep to.

A task gives a field one of three forms:

    category: 0.6                             a fixed floor
    component: {escalate: 0.5, abstain: 0.2}  two fixed floors
    severity: {max_wrong: 0.01}               the exporter chooses the floor on labelled events, see `ChosenFloor`

Below ``escalate`` the field is unsure. Below ``abstain`` its value is not even worth a second look: it is no hint for
anyone, and no escalation is spent on the event. ``abstain`` never makes a field unsure by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from edge_agent.contract.bounds import Finite, Forms
from edge_agent.contract.document import Strict
from edge_agent.errors import PermanentError

ALWAYS_UNSURE = math.inf
"""A floor that no confidence reaches."""
CERTAINTY = 0.95

Confidence = Annotated[float, Ge(0), Le(1), Finite()]
MaxWrong = Annotated[float, Gt(0), Lt(1), Finite()]
Count = Annotated[int, Ge(0)]
Certainty = Annotated[float, Ge(0.5), Lt(1), Finite()]


@dataclass(frozen=True, kw_only=True)
class FixedFloors(Strict):
    """Two floors that an engineer chose."""

    escalate: Confidence
    abstain: Confidence = 0.0

    def __post_init__(self) -> None:
        if self.abstain > self.escalate:
            raise ValueError(f"abstain {self.abstain:g} lies above escalate {self.escalate:g}")


@dataclass(frozen=True, kw_only=True)
class ErrorTarget(Strict):
    """At most this share of wrong values among those that are not unsure, with this certainty.

    Args:
        max_wrong: share, above 0 and below 1.
        certainty: probability, over the labelled events that the floor is chosen on, that the target is kept.
        abstain: as in `FixedFloors`; counts only where it lies below the floor that was chosen.
    """

    max_wrong: MaxWrong
    certainty: Certainty = CERTAINTY
    abstain: Confidence = 0.0


def _form(value: Any) -> str:
    if isinstance(value, ErrorTarget) or (isinstance(value, Mapping) and "max_wrong" in value):
        return "target"
    return "floors" if isinstance(value, Mapping | FixedFloors) else "number"


Threshold = Annotated[
    Confidence | FixedFloors | ErrorTarget,
    Forms((("number", Confidence), ("floors", FixedFloors), ("target", ErrorTarget)), _form),
]


@dataclass(frozen=True, kw_only=True)
class ChosenFloor:
    """What the exporter found for one field's `ErrorTarget`; an entry of ``floors`` in ``calibration.json``.

    Args:
        max_wrong: the target that it was chosen for.
        certainty: likewise.
        floor: the confidence from which on a value is trusted; None where no floor keeps the target.
        events: labelled events that it was chosen on.
        passed: those of them whose value reaches the floor.
        wrong: those of ``passed`` whose value is wrong.
        over: fields whose confidences are multiplied before the floor is asked; empty: this field's alone. A value is
            written after others and in view of them, so that it may be sure of itself and wrong with them.
        needed_events: without a floor, labelled events that would do if further ones are like those; None: none would.
    """

    max_wrong: MaxWrong
    certainty: Certainty
    floor: Confidence | None
    events: Count
    passed: Count
    wrong: Count
    over: tuple[str, ...] = ()
    needed_events: Count | None = None

    def __post_init__(self) -> None:
        if not self.wrong <= self.passed <= self.events:
            raise ValueError(f"{self.wrong} wrong of {self.passed} of {self.events} events cannot be")

    def is_for(self, target: ErrorTarget) -> bool:
        """Whether the floor was chosen for this very target."""
        return (self.max_wrong, self.certainty) == (target.max_wrong, target.certainty)


@dataclass(frozen=True)
class Floors:
    """Floors of a task's fields as numbers, in the order of its ``thresholds``.

    Args:
        escalate: confidence by field below which it is unsure; `ALWAYS_UNSURE` where nothing is sure enough.
        abstain: confidence by field below which its value is no hint either, at most ``escalate``.
        over: by field, whose confidences are multiplied before they are held against its floors; by default its own.
    """

    escalate: Mapping[str, float]
    abstain: Mapping[str, float]
    over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def sureness(self, name: str, confidence: Mapping[str, float]) -> float:
        """What is held against a field's floors, 0..1."""
        return math.prod(confidence[other] for other in self.over.get(name, (name,)))

    def unsure(self, confidence: Mapping[str, float]) -> tuple[str, ...]:
        """Fields whose value is not trusted; a confidence that is no number is none."""
        return self._below(self.escalate, confidence)

    def hopeless(self, confidence: Mapping[str, float]) -> tuple[str, ...]:
        """Those of the unsure fields whose value is not worth a second look."""
        return self._below(self.abstain, confidence)

    def _below(self, floors: Mapping[str, float], confidence: Mapping[str, float]) -> tuple[str, ...]:
        return tuple(name for name, floor in floors.items() if not self.sureness(name, confidence) >= floor)


def error_targets(thresholds: Mapping[str, Threshold]) -> dict[str, ErrorTarget]:
    """The fields whose floor the exporter has to choose."""
    return {name: asked for name, asked in thresholds.items() if isinstance(asked, ErrorTarget)}


def floors_of(thresholds: Mapping[str, Threshold], chosen: Mapping[str, ChosenFloor]) -> Floors:
    """Put a task's thresholds and the exporter's floors together.

    Args:
        thresholds: of the task.
        chosen: floors from the task's calibration. One for a field that has a fixed floor by now is not looked at.

    Raises:
        PermanentError: ``task.calibration_invalid`` where a target has no floor, or one of another target.
    """
    escalate: dict[str, float] = {}
    abstain: dict[str, float] = {}
    over: dict[str, tuple[str, ...]] = {}
    for name, asked in thresholds.items():
        if isinstance(asked, ErrorTarget):
            found = _chosen_for(name, asked, chosen.get(name))
            floor, lowest = ALWAYS_UNSURE if found.floor is None else found.floor, asked.abstain
            over |= {name: found.over} if found.over else {}
        elif isinstance(asked, FixedFloors):
            floor, lowest = asked.escalate, asked.abstain
        else:
            floor, lowest = asked, 0.0
        escalate[name], abstain[name] = floor, min(floor, lowest)
    return Floors(escalate, abstain, over)


def _chosen_for(name: str, target: ErrorTarget, found: ChosenFloor | None) -> ChosenFloor:
    wanted = f"field {name!r} may be wrong in {target.max_wrong:g} of its answers (certainty {target.certainty:g})"
    if found is None:
        raise PermanentError("task.calibration_invalid", f"{wanted}, but the calibration has no floor for it")
    if not found.is_for(target):
        other = f"{found.max_wrong:g} (certainty {found.certainty:g})"
        raise PermanentError("task.calibration_invalid", f"{wanted}, but its floor was chosen for {other}")
    return found
