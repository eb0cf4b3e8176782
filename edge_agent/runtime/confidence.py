"""How sure the model is: the softmax over the tokens that were allowed, sharpened or flattened by calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError


class _Calibration(BaseModel):
    format: Literal[1]
    temperature: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


def choose(logits: NDArray[np.float32], rows: NDArray[np.int64], temperature: float) -> tuple[int, float]:
    """Pick the likeliest allowed token.

    Args:
        logits: scores of every token that the head has a row for, float32 (rows,).
        rows: those of the allowed tokens, int64 (options,).
        temperature: calibration of the field; scales logits, so p_i becomes proportional to p_i^(1/T).

    Returns:
        Position in ``rows`` of the likeliest (the first of equals), and its probability among the allowed.

    Raises:
        PermanentError: ``worker.bad_logits`` when scores are not finite, or the whole vocabulary scores the same.
    """
    # All of them, not the allowed ones alone: a model that is broken beside the answer is not sound at the answer.
    if not np.isfinite(logits).all():
        raise PermanentError("worker.bad_logits", "the model's scores are not finite numbers")
    scores = logits[rows].astype(np.float64)
    best = int(scores.argmax())
    total = float(np.exp((scores - scores[best]) / temperature).sum())
    if len(rows) > 1 and total == len(rows) and float(np.ptp(logits)) == 0.0:
        raise PermanentError("worker.bad_logits", "the model scores its whole vocabulary the same")
    return best, 1.0 / total


def load_temperatures(path: Path, task: TaskSpec) -> dict[str, float]:
    """Read ``calibration.json``: ``{"format": 1, "temperature": {field: T}}``.

    Args:
        path: the file.
        task: its fields may be named.

    Returns:
        Temperature per field, 1.0 where none is given.

    Raises:
        PermanentError: ``task.calibration_invalid``.
    """
    try:
        given = _Calibration.model_validate_json(path.read_bytes()).temperature
    except (OSError, ValueError) as error:
        raise PermanentError("task.calibration_invalid", f"{path.name}: {error}", path=str(path)) from error
    names = {f.name for f in task.output_fields}
    unknown = sorted(set(given) - names)
    if unknown:
        raise PermanentError("task.calibration_invalid", f"unknown fields: {', '.join(unknown)}", path=str(path))
    return {name: given.get(name, 1.0) for name in names}
