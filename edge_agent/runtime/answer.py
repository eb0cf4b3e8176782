"""What the worker hands back: plain facts that cross the process boundary, free of any native library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edge_agent.contract.routing import Route


@dataclass(frozen=True)
class Answer:
    """The decision about one event.

    Args:
        decision: schema-valid answer, after guards.
        confidence: probability that the model gave to its own value of each field, 0..1 (before guards).
        route: ``abstained`` when a field is unsure, ``rule`` when a guard or a veto changed a confident answer,
            else ``device``.
        unsure_fields: fields whose confidence is below the task's threshold; their values are a best guess.
        hopeless_fields: those of them below the task's ``abstain`` floor: no hint, and not worth an escalation.
        guards: names of the guards that changed the decision.
        truncated: whether any of the event's text had to be cut.
        passes: forward passes through the model.
        tokens_out: tokens of the answer, chosen and forced.
        latency_ms: from event to answer, inside the process that ran the model.
        specialist: the task that the event was handed to; its values and confidences are in place of the router's.
        vetoed: the check that overruled the decision; with a colon and the reason where it could not be asked or was
            unsure.
    """

    decision: dict[str, Any]
    confidence: dict[str, float]
    route: Route
    unsure_fields: tuple[str, ...]
    guards: tuple[str, ...]
    truncated: bool
    passes: int
    tokens_out: int
    latency_ms: float
    hopeless_fields: tuple[str, ...] = ()
    specialist: str | None = None
    vetoed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form that crosses the process boundary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Answer:
        """Inverse of `as_dict` after a trip through JSON (which turns tuples into lists)."""
        lists = {name: tuple(fields[name]) for name in ("unsure_fields", "guards", "hopeless_fields")}
        return cls(**{**fields, **lists})


@dataclass(frozen=True)
class WorkerFacts:
    """What a loaded engine says about itself.

    Args:
        load_s: from process start (engine: from construction) to ready, seconds.
        rss_bytes: resident set after the load.
        providers: ONNX Runtime execution providers in use, in order of preference.
        tasks: names of the tasks that can be decided.
        prefix_tokens: per task, tokens of the cached prompt prefix.
        threads: intra-op threads.
        together: events that may share passes; 1: each is answered alone.
        warnings: faults that do not prevent deciding, one sentence each.
    """

    load_s: float
    rss_bytes: int
    providers: tuple[str, ...]
    tasks: tuple[str, ...]
    prefix_tokens: dict[str, int]
    threads: int
    together: int = 1
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The form that crosses the process boundary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> WorkerFacts:
        """Inverse of `as_dict` after a trip through JSON."""
        lists = {name: tuple(fields[name]) for name in ("providers", "tasks", "warnings")}
        return cls(**{**fields, **lists})


@dataclass(frozen=True)
class GoldenMiss:
    """A golden example that was answered wrongly, or not at all.

    Args:
        task: task name.
        index: zero-based position in ``golden.jsonl``.
        expected: the answer that was required.
        got: the answer that was given; None when an error came instead.
        error: the error's code; None when there was an answer.
    """

    task: str
    index: int
    expected: dict[str, Any]
    got: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class GoldenOutcome:
    """Result of all golden examples of a bundle.

    Args:
        total: examples tried.
        wrong: the examples that failed, in order.
        p95_ms: 95th percentile of latency; 0.0 when there were no examples.
        peak_rss_bytes: highest resident set of the process so far.
    """

    total: int
    wrong: tuple[GoldenMiss, ...]
    p95_ms: float
    peak_rss_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The form that crosses the process boundary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GoldenOutcome:
        """Inverse of `as_dict` after a trip through JSON."""
        return cls(**{**fields, "wrong": tuple(GoldenMiss(**miss) for miss in fields["wrong"])})


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile.

    Args:
        values: in any order.
        share: 0..1, e.g. 0.95.

    Returns:
        One of the values; 0.0 of nothing.
    """
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
