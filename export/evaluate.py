"""Task quality of any backend: accuracy of each field, calibration of its confidence, and what abstaining buys."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.contract.event import Event, check_event
from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.errors import EdgeError, PermanentError
from export.greedy import GreedyDecoder

ECE_BINS = 15
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
    """

    rows: int
    failed: int
    accuracy: dict[str, float]
    exact: float
    ece: dict[str, float]
    answered: float
    exact_when_answered: float

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


def greedy_backend(decoder: GreedyDecoder, task: TaskSpec, temperatures: dict[str, float] | None = None) -> Decide:
    """The oracle as a backend."""

    def decide(event: Event) -> Outcome:
        decoded = decoder.decide(task, event)
        decision, guards = task.apply_guards(event, decoded.decision)
        return Outcome(decision, decoded.confidence(temperatures), bool(guards))

    return decide


def evaluate(decide: Decide, rows: Sequence[GoldenExample], task: TaskSpec) -> Quality:
    """Answer every row and compare.

    Args:
        decide: the backend.
        rows: labelled events.
        task: for its fields and thresholds.

    Returns:
        The figures.
    """
    fields = [field.name for field in task.output_fields]
    right = dict.fromkeys(fields, 0)
    calibration: dict[str, list[tuple[float, bool]]] = {name: [] for name in fields}
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
            if not outcome.guarded:
                calibration[name].append((outcome.confidence[name], hit))
        exact += all(hits.values())
        if all(outcome.confidence[name] >= floor for name, floor in task.thresholds.items()):
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
    )


def expected_calibration_error(pairs: Sequence[tuple[float, bool]]) -> float:
    """Mean distance between confidence and accuracy over equal-width bins, weighted by their size.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 5.
    """
    if not pairs:
        return 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(ECE_BINS)]
    for confidence, hit in pairs:
        bins[min(ECE_BINS - 1, int(confidence * ECE_BINS))].append((confidence, hit))
    return sum(abs(sum(c for c, _ in b) - sum(h for _, h in b)) for b in bins) / len(pairs)
