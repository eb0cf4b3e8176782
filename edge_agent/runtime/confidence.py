"""How sure the model is: the softmax over the tokens that were allowed, sharpened or flattened by calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import PermanentError


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
