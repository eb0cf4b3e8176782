"""Task quality of any backend: accuracy of each field, calibration of its confidence, and what abstaining buys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.contract.event import Event, check_event
from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.contract.thresholds import Floors, floors_of
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.runtime.calibration import Calibration
from export.proof.greedy import GreedyDecoder
from export.proof.passing import Passing, passing
from export.proof.reliability import Bin, Pair, RiskPoint, bins, expected_calibration_error, risk_coverage

CURVES = ("reliability", "risk_coverage")
"""Keys of `Quality.as_dict` that are for pictures: too long for a manifest."""
Decide = Callable[[Event], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a backend answered.

    Args:
        decision: after guards.
        confidence: of the model's own value of each field, 0..1.
        guarded: whether a guard changed the decision.
    """

    decision: dict[str, Any]
    confidence: dict[str, float]
    guarded: bool


@dataclass(frozen=True)
class Quality:
    """Figures over labelled events.

    Args:
        rows: number of events.
        failed: events that brought an error instead of an answer; they count as wrong in every field.
        accuracy: share of right values (0..1) by field.
        exact: share of events with every field right.
        ece: expected calibration error (0..1) by field, 15 equal-width bins, rows without a guard's change.
        answered: share of events whose every field reaches the task's threshold.
        exact_when_answered: `exact` among those.
        reliability: bins of confidence and accuracy by field, the rows of ``ece``.
        risk_by_field: errors of each field against the share of events that its threshold lets through, same rows.
        risk: the same for whole decisions, guards included: as sure as their least sure field, right when every
            field is.
        floors: what the floor of each field with a threshold lets through; guarded rows count, as they are published.
    """

    rows: int
    failed: int
    accuracy: dict[str, float]
    exact: float
    ece: dict[str, float]
    answered: float
    exact_when_answered: float
    reliability: dict[str, tuple[Bin, ...]]
    risk_by_field: dict[str, tuple[RiskPoint, ...]]
    risk: tuple[RiskPoint, ...]
    floors: dict[str, Passing] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, four decimals: more would be noise of the sample."""
        return {
            "rows": self.rows,
            "failed": self.failed,
            "accuracy": {name: round(value, 4) for name, value in self.accuracy.items()},
            "exact": round(self.exact, 4),
            "ece": {name: round(value, 4) for name, value in self.ece.items()},
            "answered": round(self.answered, 4),
            "exact_when_answered": round(self.exact_when_answered, 4),
            "floors": {name: found.as_dict() for name, found in self.floors.items()},
            "reliability": {name: [b.as_dict() for b in found] for name, found in self.reliability.items()},
            "risk_coverage": {
                "decision": [point.as_dict() for point in self.risk],
                "fields": {name: [p.as_dict() for p in points] for name, points in self.risk_by_field.items()},
            },
        }


def without_curves(quality: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Figures that a manifest carries to every device: all but the points of pictures.

    Args:
        quality: task -> precision -> `Quality.as_dict`.
    """
    return {
        task: {
            precision: {key: value for key, value in figures.items() if key not in CURVES}
            for precision, figures in by_precision.items()
        }
        for task, by_precision in quality.items()
    }


def read_labelled(path: Path, task: TaskSpec, limit: int | None = None) -> list[GoldenExample]:
    """Read JSON lines of ``{"event": {...}, "decision": {...}}`` (further keys are ignored).

    Raises:
        PermanentError: ``export.data_unreadable`` or ``export.data_invalid`` with the line number.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError("export.data_unreadable", f"cannot read {path}: {error}") from error
    rows = [_labelled(line, f"{path.name} line {number}", task) for number, line in enumerate(lines[:limit], start=1)]
    if not rows:
        raise PermanentError("export.data_invalid", f"{path.name} holds no labelled event")
    return rows


def _labelled(line: str, where: str, task: TaskSpec) -> GoldenExample:
    try:
        parsed = json.loads(line)
        row = GoldenExample(event=check_event(parsed["event"]), decision=parsed["decision"])
        problems = task.check_decision(dict(row.decision))
    except (ValueError, KeyError, TypeError, EdgeError) as error:
        raise PermanentError("export.data_invalid", f"{where}: {error}") from error
    if problems:
        raise PermanentError("export.data_invalid", f"{where}: {'; '.join(problems)}")
    return row


def greedy_backend(decoder: GreedyDecoder, task: TaskSpec, calibration: Calibration | None = None) -> Decide:
    """The oracle as a backend."""
    temperatures = calibration.temperatures if calibration else None

    def decide(event: Event) -> Outcome:
        decoded = decoder.decide(task, event)
        decision, guards = task.apply_guards(event, decoded.decision)
        confidence = decoded.confidence(temperatures)
        return Outcome(decision, calibration.published(confidence) if calibration else confidence, bool(guards))

    return decide


def evaluate(decide: Decide, rows: Sequence[GoldenExample], task: TaskSpec, floors: Floors | None = None) -> Quality:
    """Answer every row and compare.

    Args:
        decide: the backend.
        rows: labelled events.
        task: for its fields and thresholds.
        floors: its thresholds as numbers; needed where it asks for an error target.

    Returns:
        The figures.

    Raises:
        PermanentError: ``task.calibration_invalid`` for a target without ``floors``.
    """
    floors = floors_of(task.thresholds, {}) if floors is None else floors
    fields = [field.name for field in task.output_fields]
    right = dict.fromkeys(fields, 0)
    calibration: dict[str, list[Pair]] = {name: [] for name in fields}
    published: dict[str, list[Pair]] = {name: [] for name in fields}
    whole: list[Pair] = []
    failed = exact = answered = answered_exact = 0
    for row in rows:
        try:
            outcome = decide(dict(row.event))
        except EdgeError:
            failed += 1
            continue
        hits = {name: outcome.decision[name] == row.decision[name] for name in fields}
        for name, hit in hits.items():
            right[name] += hit
            published[name].append((floors.sureness(name, outcome.confidence), hit))
            if not outcome.guarded:
                calibration[name].append((outcome.confidence[name], hit))
        exact += all(hits.values())
        whole.append((min(outcome.confidence[name] for name in fields), all(hits.values())))
        if not floors.unsure(outcome.confidence):
            answered += 1
            answered_exact += all(hits.values())
    return Quality(
        rows=len(rows),
        failed=failed,
        accuracy={name: count / len(rows) for name, count in right.items()},
        exact=exact / len(rows),
        ece={name: expected_calibration_error(pairs) for name, pairs in calibration.items()},
        answered=answered / len(rows),
        exact_when_answered=answered_exact / answered if answered else 0.0,
        reliability={name: bins(pairs) for name, pairs in calibration.items()},
        risk_by_field={name: risk_coverage(pairs, len(rows)) for name, pairs in calibration.items()},
        risk=risk_coverage(whole, len(rows)),
        floors=passing(task.thresholds, floors, published, len(rows)),
    )
