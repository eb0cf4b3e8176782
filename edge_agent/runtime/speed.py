"""What the engine does to be fast. Each lever can be switched off, to measure its share; none changes an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EVENT_CACHE_BYTES = 16 << 20


@dataclass(frozen=True)
class Speed:
    """The levers.

    Args:
        prefix_dir: where the prefixes' states are kept between starts; None: nowhere.
        event_cache_bytes: keys and values of events' beginnings, for each task; 0: none.
        decision_cache_bytes: answers to repeated events, for each task that does not refuse it; 0: none, as where
            answers are measured.
        drafts: whether probable answers are checked in one pass.
        alternatives: whether a pass tries several ways on from a choice, where the graph allows it.
        together: events that may share passes, where the graph allows it.
        large_pages: whether the heap is moved to large pages after the first answer; for processes that go on.
    """

    prefix_dir: Path | None = None
    event_cache_bytes: int = EVENT_CACHE_BYTES
    decision_cache_bytes: int = 0
    drafts: bool = True
    alternatives: bool = True
    together: int = 4
    large_pages: bool = False


PLAIN = Speed(event_cache_bytes=0, drafts=False, alternatives=False, together=1)
"""Nothing but the cached prefix: what the levers are measured against."""
