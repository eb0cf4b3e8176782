"""What a floor lets through on labelled events, and whether a target was kept there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_agent.contract.thresholds import ErrorTarget, Floors, Threshold
from export.proof.binomial import interval
from export.proof.reliability import Pair

Verdict = Literal["kept", "within chance", "broken", "nothing passes"]


@dataclass(frozen=True)
class Passing:
    """One field's floor, measured.

    Args:
        floor: confidence from which on a value is trusted; infinite where none is.
        target: what the task asks for; None where it gives the floor itself.
        events: labelled events, those included that brought no answer.
        passed: those whose value reaches the floor.
        wrong: those of ``passed`` whose value, as published, is wrong.
        over: fields whose confidences are multiplied before the floor is asked; empty: this field's alone.
    """

    floor: float
    target: ErrorTarget | None
    events: int
    passed: int
    wrong: int
    over: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of all events that pass, 0..1."""
        return self.passed / self.events if self.events else 0.0

    @property
    def wrong_share(self) -> float | None:
        """Share of wrong values among those that pass, 0..1; None of nothing."""
        return self.wrong / self.passed if self.passed else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Exact 95 % interval of `wrong_share`."""
        return interval(self.wrong, self.passed) if self.passed else None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the target was kept on these events; None without a target.

        ``within chance``: more wrong values than asked for, but no more than the sample may show of a kept target.
        """
        if self.target is None:
            return None
        if self.interval is None:
            return "nothing passes"
        if self.wrong <= self.target.max_wrong * self.passed:
            return "kept"
        return "broken" if self.interval[0] > self.target.max_wrong else "within chance"

    def as_dict(self) -> dict[str, Any]:
        """JSON form; a floor that nothing reaches is null."""
        asked = {} if self.target is None else {"max_wrong": self.target.max_wrong, "certainty": self.target.certainty}
        ends = self.interval
        return {
            **asked,
            **({"over": list(self.over)} if self.over else {}),
            "floor": self.floor if math.isfinite(self.floor) else None,
            "passed": self.passed,
            "wrong": self.wrong,
            "coverage": round(self.coverage, 4),
            "wrong_share": None if self.wrong_share is None else round(self.wrong_share, 4),
            "interval": None if ends is None else [round(end, 4) for end in ends],
            "verdict": self.verdict,
        }


def passing(
    thresholds: Mapping[str, Threshold], floors: Floors, pairs: Mapping[str, Sequence[Pair]], events: int
) -> dict[str, Passing]:
    """Measure every floor of a task.

    Args:
        thresholds: of the task.
        floors: the same as numbers.
        pairs: `Floors.sureness` and hit of each answer, by field; the value that counts is the published one.
        events: labelled events.
    """
    found = {}
    for name, floor in floors.escalate.items():
        asked = thresholds[name]
        hits = [hit for confidence, hit in pairs[name] if confidence >= floor]
        target = asked if isinstance(asked, ErrorTarget) else None
        found[name] = Passing(floor, target, events, len(hits), hits.count(False), floors.over.get(name, ()))
    return found
