"""What is known of how far a task's confidences can be trusted: the file ``calibration.json``.

    {"format": 1, "temperature": {field: T}, "floors": {field: {"max_wrong": 0.01, "floor": 0.97, ...}}}

An agent that is older than ``floors`` ignores them and refuses the task that asks for them. One that is older than
``knots`` would publish another confidence than the exporter measured, so a file with knots is of format 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, MaxLen, MinLen

from edge_agent.contract.bounds import Finite
from edge_agent.contract.document import DocumentError, read_json
from edge_agent.contract.task import TaskSpec
from edge_agent.contract.thresholds import ChosenFloor, Confidence, Floors, floors_of
from edge_agent.errors import PermanentError

Line = Annotated[tuple[Confidence, ...], MinLen(2), MaxLen(4096)]


@dataclass(frozen=True, kw_only=True)
class Knots:
    """A rising line through points: how a confidence after temperature is read.

    Args:
        raw: confidences after temperature, strictly rising.
        right: share of right answers at each, never falling.
    """

    raw: Line
    right: Line

    def __post_init__(self) -> None:
        if len(self.raw) != len(self.right):
            raise ValueError(f"{len(self.raw)} raw confidences, but {len(self.right)} shares of right answers")
        if any(b <= a for a, b in pairwise(self.raw)) or any(b < a for a, b in pairwise(self.right)):
            # A falling line would rank a surer answer below a less sure one.
            raise ValueError("the knots do not rise")

    def read(self, confidence: float) -> float:
        """The share of right answers at a confidence, 0..1; level beyond the first and the last knot."""
        return float(np.interp(confidence, self.raw, self.right))


@dataclass(frozen=True, kw_only=True)
class _File:
    format: Literal[1, 2]
    temperature: dict[str, Annotated[float, Gt(0), Finite()]] = field(default_factory=dict)
    knots: dict[str, Knots] = field(default_factory=dict)
    floors: dict[str, ChosenFloor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.format == 2) != bool(self.knots):
            raise ValueError("a calibration has knots in format 2, and only there")


@dataclass(frozen=True)
class Calibration:
    """A task's calibration.

    Args:
        temperatures: by field, 1.0 where none is given.
        floors: of the task's thresholds.
        knots: by field, where temperature alone did not do.
        chosen: how the exporter came to the floors that it chose, by field.
    """

    temperatures: Mapping[str, float]
    floors: Floors
    knots: Mapping[str, Knots] = field(default_factory=dict)
    chosen: Mapping[str, ChosenFloor] = field(default_factory=dict)

    def published(self, confidence: Mapping[str, float]) -> dict[str, float]:
        """Confidences as they leave the device.

        Args:
            confidence: by field, after temperature, 0..1.
        """
        return {name: self.knots[name].read(p) if name in self.knots else p for name, p in confidence.items()}


def load_calibration(path: Path | None, task: TaskSpec) -> Calibration:
    """Read ``calibration.json``.

    Args:
        path: the file; None where the bundle has none.
        task: its fields may be named, and its thresholds may need floors.

    Raises:
        PermanentError: ``task.calibration_invalid``.
    """
    if path is None:
        return Calibration({}, floors_of(task.thresholds, {}))
    try:
        given = read_json(_File, path.read_bytes())
    except (OSError, DocumentError) as error:
        raise PermanentError("task.calibration_invalid", f"{path.name}: {error}", path=str(path)) from error
    names = {f.name for f in task.output_fields}
    named = {*given.temperature, *given.knots, *given.floors, *(o for f in given.floors.values() for o in f.over)}
    unknown = sorted(named - names)
    if unknown:
        raise PermanentError("task.calibration_invalid", f"unknown fields: {', '.join(unknown)}", path=str(path))
    temperatures = {name: given.temperature.get(name, 1.0) for name in names}
    return Calibration(temperatures, floors_of(task.thresholds, given.floors), given.knots, given.floors)
