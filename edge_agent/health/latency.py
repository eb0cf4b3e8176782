"""Percentiles over the last decisions, in bounded memory."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

DEFAULT_WINDOW = 512


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies over the window in ms; None while it is empty."""

    count: int
    p50_ms: float | None
    p95_ms: float | None
    max_ms: float | None


class LatencyWindow:
    """The last ``size`` latencies.

    Args:
        size: how many are kept; 512 floats sort in well under a millisecond.
    """

    def __init__(self, size: int = DEFAULT_WINDOW) -> None:
        self._lock = threading.Lock()
        self._samples: deque[float] = deque(maxlen=size)

    def add(self, latency_ms: float) -> None:
        """Record one latency in ms; a value that is not finite or negative is a clock's fault and is left out."""
        if math.isfinite(latency_ms) and latency_ms >= 0:
            with self._lock:
                self._samples.append(latency_ms)

    def clear(self) -> None:
        """Forget everything: a new model starts with an empty window."""
        with self._lock:
            self._samples.clear()

    def percentiles(self) -> Percentiles:
        """Nearest-rank percentiles over the window (each is a latency that really occurred)."""
        with self._lock:
            ordered = sorted(self._samples)
        if not ordered:
            return Percentiles(0, None, None, None)
        return Percentiles(len(ordered), _rank(ordered, 0.50), _rank(ordered, 0.95), ordered[-1])


def _rank(ordered: list[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
