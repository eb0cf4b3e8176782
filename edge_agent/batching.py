"""How many waiting events to answer together: as many as it pays, and no more than their deadline allows.

Events that share passes are answered at the same time, so the first of them waits for the last. That pays while others
wait anyway, and where a shared pass costs less than the passes that it replaces; both are seen, not assumed: the time
for each event is kept for every size, and the best size is used, with a look at the others now and then.
"""

from __future__ import annotations

_SMOOTHING = 0.2
_GAIN = 0.95
"""Together must be at least this much quicker for each event, for the first of them waits."""
_LOOK_AGAIN = 200
"""Answers after which a size that lost is tried again: other events, another load, a cooler board."""
_DEADLINE_SHARE = 0.25


class BatchSize:
    """The number of events to take at a time."""

    def __init__(self) -> None:
        self._event_s: dict[int, float] = {}
        self._since_look = 0

    def choose(self, waiting: int, most: int, deadline_s: float) -> int:
        """How many of the waiting events to answer together.

        Args:
            waiting: events at hand, at least one.
            most: that the model can answer together.
            deadline_s: of their task.

        Returns:
            1, or the largest usable size.
        """
        size = min(waiting, most)
        alone_s = self._event_s.get(1)
        if size < 2 or alone_s is None:  # the first event shows what one costs
            return 1
        # Were nothing gained, all of them would take this long.
        size = min(size, int(deadline_s * _DEADLINE_SHARE / alone_s)) if alone_s else size
        together_s = self._event_s.get(size)
        if size < 2:
            return 1
        if together_s is None or together_s < alone_s * _GAIN:
            return size
        return size if self._since_look >= _LOOK_AGAIN else 1

    def learn(self, size: int, seconds: float) -> None:
        """Take into account what ``size`` events took together."""
        event_s = seconds / size
        known = self._event_s.get(size)
        self._event_s[size] = event_s if known is None else known + _SMOOTHING * (event_s - known)
        self._since_look = 0 if size > 1 else self._since_look + 1
