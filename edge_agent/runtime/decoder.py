"""From a prompt to a schema-valid answer in as few passes as there are decisions.

A pass takes everything that is known but not yet seen by the model (the event at first, later the chosen token with
all that it forces) and returns the scores for the next decision. The last field's closing tokens are never run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import PermanentError
from edge_agent.runtime.confidence import choose
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, Value
from edge_agent.runtime.guided import GuidedField


class Forward(Protocol):
    """One pass of a model with a memory of what came before."""

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens (ids); returns the scores after the last one, float32 (rows,)."""


@dataclass(frozen=True)
class Decoded:
    """An answer as the model gave it.

    Args:
        values: field to value, in schema order.
        confidence: field to probability of its value.
        passes: forward passes used.
        tokens: ids of the whole answer, chosen and forced.
    """

    values: dict[str, Value]
    confidence: dict[str, float]
    passes: int
    tokens: list[int]


def decode(
    model: Forward,
    plan: AnswerPlan,
    prompt: Sequence[int],
    temperatures: Mapping[str, float],
    deadline_at_s: float,
) -> Decoded:
    """Answer a prompt.

    Args:
        model: its memory holds the task's prefix.
        plan: the task's decisions.
        prompt: token ids of the event.
        temperatures: calibration per field.
        deadline_at_s: `time.monotonic` after which no further pass begins.

    Returns:
        The answer; valid by construction.

    Raises:
        PermanentError: ``worker.deadline``, ``worker.bad_logits``, or what the model raises.
    """
    run = _Run(model, [*prompt, *plan.opening], deadline_at_s)
    values: dict[str, Value] = {}
    confidence: dict[str, float] = {}
    for planned in plan.fields:
        temperature = temperatures.get(planned.name, 1.0)
        if isinstance(planned, ClosedField):
            value, probability = _closed(run, planned, temperature)
        else:
            value, probability = _guided(run, planned, temperature)
        values[planned.name], confidence[planned.name] = value, probability
    return Decoded(values, confidence, run.passes, run.tokens[len(prompt) :])


class _Run:
    """One answer in the making: all tokens so far, of which the model has seen the first ``_seen``."""

    def __init__(self, model: Forward, tokens: list[int], deadline_at_s: float) -> None:
        self.tokens = tokens
        self.passes = 0
        self._model = model
        self._deadline_at_s = deadline_at_s
        self._seen = 0

    def scores(self) -> NDArray[np.float32]:
        """Run a pass over what the model has not seen."""
        if time.monotonic() >= self._deadline_at_s:
            raise PermanentError("worker.deadline", f"deadline passed after {self.passes} passes", passes=self.passes)
        logits = self._model.forward(self.tokens[self._seen :])
        self._seen = len(self.tokens)
        self.passes += 1
        return logits


def _closed(run: _Run, planned: ClosedField, temperature: float) -> tuple[Value, float]:
    run.tokens.extend(planned.forced)
    node = planned.root
    probability = 1.0
    while isinstance(node, Branch):
        position, share = choose(run.scores(), node.rows, temperature)
        edge = node.edges[position]
        probability *= share
        run.tokens.append(int(node.ids[position]))
        run.tokens.extend(edge.forced)
        node = edge.target
    return node.value, probability


def _guided(run: _Run, planned: GuidedField, temperature: float) -> tuple[Value, float]:
    grammar = planned.start()
    probability = 1.0
    while True:
        run.tokens.extend(grammar.forced())
        if grammar.finished():
            return grammar.value(), probability
        ids = grammar.allowed()
        position, share = choose(run.scores(), grammar.rows(ids), temperature)
        probability *= share
        grammar.choose(int(ids[position]))
        run.tokens.append(int(ids[position]))
