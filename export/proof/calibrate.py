"""One temperature per field, so that a confidence of 0.9 is right nine times in ten.

``tasks/<task>/calibration.json`` is ``{"format": 1, "temperature": {"category": 1.3, ...}}``; the engine applies
p_i ∝ p_i^(1/T) to the softmax over the allowed tokens at each choice of the field. The decision is unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from edge_agent.contract.task import GoldenExample, TaskSpec
from export.proof.greedy import Choice, GreedyDecoder

CALIBRATION_NAME = "calibration.json"
TEMPERATURES = tuple(round(0.3 * 1.02**step, 2) for step in range(180))  # 0.3 .. 10.4
MIN_ROWS = 50
"""Fewer rows than this say too little about a tail: the field keeps temperature 1."""

_FLOOR = 1e-6

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
    trials: dict[str, list[Trial]] = {field.name: [] for field in task.output_fields}
    for row in rows:
        decoded = decoder.decide(task, dict(row.event))
        for name, found in trials.items():
            choices = tuple(choice for choice in decoded.choices if choice.field == name)
            if choices:
                found.append((choices, decoded.decision[name] == row.decision[name]))
    return {name: best_temperature(found) for name, found in trials.items()}


def best_temperature(trials: Sequence[Trial]) -> float:
    """The grid's temperature with the least log loss; 1.0 for too few trials."""
    if len(trials) < MIN_ROWS:
        return 1.0
    return min(TEMPERATURES, key=lambda temperature: _log_loss(trials, temperature))


def calibration_bytes(temperatures: dict[str, float]) -> bytes:
    """The file's canonical bytes."""
    return (json.dumps({"format": 1, "temperature": temperatures}, indent=2, sort_keys=True) + "\n").encode()


def _log_loss(trials: Sequence[Trial], temperature: float) -> float:
    loss = 0.0
    for choices, right in trials:
        confidence = math.prod(choice.probability(temperature) for choice in choices)
        confidence = min(1 - _FLOOR, max(_FLOOR, confidence))
        loss -= math.log(confidence if right else 1 - confidence)
    # Nine decimals: a sum must not decide between equal temperatures by its last bit.
    return round(loss, 9)
