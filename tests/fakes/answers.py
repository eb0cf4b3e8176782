"""An answer without what depends on the events before it."""

from __future__ import annotations

from dataclasses import replace

from edge_agent.runtime.answer import Answer

ROUNDING = 1e-4
"""What a guess out of line (`edge_agent.runtime.decoder.Lane.take`) may do to a probability."""


class Near(float):
    """Equal to what is as near as rounding."""

    # What is only nearly equal has no hash; typeshed knows no class that takes its base's away.
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - float(other)) <= ROUNDING

    def __ne__(self, other: object) -> bool:
        return not self == other


def timeless(answer: Answer) -> Answer:
    """Without its time and its passes: an answer that was guessed takes fewer. Probabilities are compared as `Near`."""
    confidence: dict[str, float] = {name: Near(probability) for name, probability in answer.confidence.items()}
    return replace(answer, latency_ms=0.0, passes=0, confidence=confidence)
