"""From a router's own answer to the decision: specialist, then check, then guards, all before one deadline.

Three rules say what happens when a part fails:

- A specialist that cannot answer fails the event. The router's own answer never stands in for it: it is the one that
  the task's author did not trust.
- A check that cannot be asked (the deadline has passed, the event holds nothing that it reads) or that is unsure of
  letting the decision pass makes the decision abstained. No unchecked decision is published as a sure one.
- A fault of the model (``worker.bad_logits``, ``worker.out_of_memory``, ``worker.inference``) is an error wherever it
  occurs, so that a candidate's probation sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from edge_agent.contract.event import Event
from edge_agent.contract.guards import Effect, enforce
from edge_agent.contract.routing import Route, Veto, matches
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.calibration import Calibration
from edge_agent.runtime.decoder import Decoded

_UNASKED = frozenset({"worker.deadline", "worker.context"})
"""With every ``event.*``: why a check has no answer although nothing is wrong with the model."""


@dataclass(frozen=True)
class OwnAnswer:
    """What one task's model says about an event, before any rule.

    Args:
        spec: the task.
        calibration: how far its confidences can be trusted.
        decoded: its values and confidences.
        truncated: whether text of the event was cut for it.
        is_known: whether it was answered from memory.
    """

    spec: TaskSpec
    calibration: Calibration
    decoded: Decoded
    truncated: bool
    is_known: bool = False

    @cached_property
    def confidence(self) -> dict[str, float]:
        """By field, as it leaves the device."""
        return self.calibration.published(self.decoded.confidence)

    @property
    def unsure(self) -> tuple[str, ...]:
        """Fields below their floor."""
        return self.calibration.floors.unsure(self.confidence)

    @property
    def hopeless(self) -> tuple[str, ...]:
        """Those of them below their lowest floor."""
        return self.calibration.floors.hopeless(self.confidence)

    @property
    def passes(self) -> int:
        """Forward passes that it took."""
        return 0 if self.is_known else self.decoded.passes


Ask = Callable[[str, Event, float], OwnAnswer]
"""Task, event and `time.monotonic` of the deadline to the task's own answer."""


@dataclass(frozen=True)
class _Ruling:
    """What a check says.

    Args:
        vetoed: as in `Answer`.
        effects: on the decision's fields.
        unsure: fields that nobody has let pass.
        parts: the check's own answer, where there is one.
        guards: those of its guards that changed that answer.
    """

    vetoed: str | None = None
    effects: Mapping[str, Effect] = field(default_factory=dict)
    unsure: tuple[str, ...] = ()
    parts: tuple[OwnAnswer, ...] = ()
    guards: tuple[str, ...] = ()


def decide(ask: Ask, own: OwnAnswer, event: Event, *, started_s: float, deadline_at_s: float) -> Answer:
    """Decide one event.

    Args:
        ask: answers with one task alone.
        own: the own answer of the task that the event was sent to.
        event: a flat event.
        started_s: `time.monotonic` at which the event came in.
        deadline_at_s: `time.monotonic` after which no further pass begins, whoever's pass it is.

    Returns:
        A schema-valid answer of that task.

    Raises:
        EdgeError: what ``ask`` raises, but for a check that cannot be asked.
        PermanentError: ``worker.invalid_answer``.
    """
    spec, parts = own.spec, [own]
    values, confidence = dict(own.decoded.values), dict(own.confidence)
    unsure, hopeless = [*own.unsure], [*own.hopeless]
    guards: list[str] = []
    specialist = next((rule.to for rule in spec.handoff if matches(rule.when, own.decoded.values)), None)
    if specialist is not None:
        expert = ask(specialist, event, deadline_at_s)
        parts.append(expert)
        answered, named = _after_own_guards(expert, event)
        guards += named
        values |= answered
        confidence |= expert.confidence
        # Each field is held to the floor of the task that answered it.
        unsure = [name for name in unsure if name not in answered] + [*expert.unsure]
        hopeless = [name for name in hopeless if name not in answered] + [*expert.hopeless]
    ruling = _Ruling() if spec.veto is None else _ruling(ask, spec.veto, spec, event, deadline_at_s)
    parts += ruling.parts
    guards += ruling.guards
    before, fields = dict(values), {output.name: output for output in spec.output_fields}
    for name, effect in ruling.effects.items():
        values[name] = enforce(fields[name], effect, values[name])
    overruled = values != before
    unsure += [name for name in ruling.unsure if name not in unsure]
    decision, last = spec.apply_guards(event, values)
    guards += last
    problems = spec.check_decision(decision)
    if problems:
        # Cannot happen by construction; a decision that reaches a machine is checked all the same.
        raise PermanentError("worker.invalid_answer", "; ".join(problems))
    by_model: Route = "cache" if all(part.is_known for part in parts) else "device"
    route: Route = "abstained" if unsure else ("rule" if guards or overruled else by_model)
    return Answer(
        decision=decision,
        confidence=confidence,
        route=route,
        unsure_fields=tuple(unsure),
        hopeless_fields=tuple(hopeless),
        guards=tuple(guards),
        truncated=any(part.truncated for part in parts),
        passes=sum(part.passes for part in parts),
        tokens_out=sum(len(part.decoded.tokens) for part in parts),
        latency_ms=(time.monotonic() - started_s) * 1000,
        specialist=specialist,
        vetoed=ruling.vetoed,
    )


def _ruling(ask: Ask, veto: Veto, router: TaskSpec, event: Event, deadline_at_s: float) -> _Ruling:
    everything = tuple(output.name for output in router.output_fields)
    doubtful = everything if veto.abstain else tuple(veto.then)
    try:
        check = ask(veto.task, event, deadline_at_s)
    except EdgeError as error:
        if error.code in _UNASKED or error.code.startswith("event."):
            return _Ruling(f"{veto.task}: {error.code}", unsure=doubtful)
        raise
    answered, named = _after_own_guards(check, event)
    ruling = _Ruling(parts=(check,), guards=tuple(named))
    if matches(veto.when, answered):
        unsure = everything if veto.abstain else ()
        return replace(ruling, vetoed=veto.task, effects=veto.then, unsure=unsure)
    if any(name in check.unsure or check.confidence[name] < veto.min_confidence for name in veto.when):
        return replace(ruling, vetoed=f"{veto.task}: unsure", unsure=doubtful)
    return ruling


def _after_own_guards(part: OwnAnswer, event: Event) -> tuple[dict[str, Any], list[str]]:
    """A specialist's or check's answer as its own task would give it, and its guards that changed it."""
    answered, named = part.spec.apply_guards(event, dict(part.decoded.values))
    return answered, [f"{part.spec.name}.{name}" for name in named]
