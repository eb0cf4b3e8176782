"""One temperature per field, so that a confidence of 0.9 is right nine times in ten.

``tasks/<task>/calibration.json`` is ``{"format": 1, "temperature": {"category": 1.3, ...}}``; the engine applies
p_i ∝ p_i^(1/T) to the softmax over the allowed tokens at each choice of the field. The decision is unchanged. Beside
the temperatures stand the floors that were chosen, and (in format 2) a line for fields that one temperature cannot
straighten: see `edge_agent.runtime.calibration`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edge_agent.contract.document import to_document
from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.contract.thresholds import ChosenFloor
from edge_agent.runtime.calibration import Knots
from export.proof.greedy import Choice, GreedyDecoder
from export.proof.isotonic import log_loss
from export.proof.reliability import Pair

CALIBRATION_NAME = "calibration.json"
TEMPERATURES = tuple(round(0.3 * 1.02**step, 2) for step in range(180))  # 0.3 .. 10.4
MIN_ROWS = 50
"""Fewer rows than this say too little about a tail: the field keeps temperature 1."""

Trial = tuple[tuple[Choice, ...], bool]


def fit_temperatures(decoder: GreedyDecoder, task: TaskSpec, rows: Sequence[GoldenExample]) -> dict[str, float]:
    """Fit temperatures on labelled events that the model was not trained on.

    Args:
        decoder: the INT4 model that will be shipped; each precision has its own confidence.
        task: the task.
        rows: labelled events.

    Returns:
        Temperature by field, two decimals. It minimises the log loss of "is this field right?" under the product of
        the field's choice probabilities.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.
    """
    return {name: best_temperature(found) for name, found in gather_trials(decoder, task, rows).items()}


def gather_trials(decoder: GreedyDecoder, task: TaskSpec, rows: Sequence[GoldenExample]) -> dict[str, list[Trial]]:
    """What the model chose for each field and whether it was right, by field; guards are not asked.

    Args:
        decoder: the model that will be shipped.
        task: the task.
        rows: labelled events.
    """
    trials: dict[str, list[Trial]] = {field.name: [] for field in task.output_fields}
    for row in rows:
        decoded = decoder.decide(task, dict(row.event))
        for name, found in trials.items():
            choices = tuple(choice for choice in decoded.choices if choice.field == name)
            if choices:
                found.append((choices, decoded.decision[name] == row.decision[name]))
    return trials


def best_temperature(trials: Sequence[Trial]) -> float:
    """The grid's temperature with the least log loss; 1.0 for too few trials."""
    if len(trials) < MIN_ROWS:
        return 1.0
    return min(TEMPERATURES, key=lambda temperature: _log_loss(trials, temperature))


def sureness(trial: Trial, temperature: float) -> Pair:
    """Confidence at a temperature, and hit."""
    choices, right = trial
    return math.prod(choice.probability(temperature) for choice in choices), right


def calibration_bytes(
    temperatures: Mapping[str, float],
    knots: Mapping[str, Knots] | None = None,
    floors: Mapping[str, ChosenFloor] | None = None,
) -> bytes:
    """The file's canonical bytes.

    Args:
        temperatures: by field.
        knots: by field, where temperature alone did not do. They make it a file of format 2.
        floors: by field, where the task asks for an error target.
    """
    content: dict[str, Any] = {"format": 2 if knots else 1, "temperature": dict(temperatures)}
    if knots:
        content["knots"] = {name: to_document(line) for name, line in knots.items()}
    if floors:
        content["floors"] = {name: _as_written(found) for name, found in floors.items()}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _as_written(found: ChosenFloor) -> dict[str, Any]:
    # The floor is spelled out: one that was not found must not look like one that was forgotten.
    said = {name: value for name, value in to_document(found).items() if value not in (None, [])}
    return {**said, "floor": found.floor}


def _log_loss(trials: Sequence[Trial], temperature: float) -> float:
    # Nine decimals: a sum must not decide between equal temperatures by its last bit.
    return round(sum(log_loss(sureness(trial, temperature), float) for trial in trials), 9)
