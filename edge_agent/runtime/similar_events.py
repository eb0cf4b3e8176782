"""Earlier events that are much like a new one: what was answered to them is what will probably be answered to it.

A gateway hears from the same few machines, and one machine's complaint reads like its last one. Which tokens two events
share tells how much alike they are: a rare token tells much, and one that most events have nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_EVENTS = 128
"""Events that are remembered, the latest: some 3 KB each."""
MAX_TOKENS = 128
"""Tokens of an event that are looked at, the first: what stays the same of a machine's events stands there."""
MOST_SIMILAR = 16
"""Earlier events that are told: others add little."""
_SHARPNESS = 8
"""A share counts to this power: 0.9 for 43 %, 0.7 for 6 %, 0.5 for nothing."""
_LEAST_SHARE = 0.45
_NEW = 0.25
"""A token that no event has counts so much: new words tell little, and many of them more."""

Tokens = tuple[int, ...]
Similar = tuple[tuple[float, Tokens], ...]
"""Answers to earlier events, each with how much its event is like the new one, 0 to 1."""


class SimilarEvents:
    """The latest events of one task and their answers."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tokens, Tokens]] = []  # distinct tokens and answer, the oldest overwritten first
        self._oldest = 0
        self._places: dict[int, int] = {}  # token -> bit n is set where event n of `_seen` has it
        self._last: tuple[Tokens, Similar] = ((), ())

    def __len__(self) -> int:
        return len(self._seen)

    def remembered_tokens(self) -> int:
        """Different tokens that the remembered events have."""
        return len(self._places)

    def learn(self, event: Sequence[int], answer: Sequence[int]) -> None:
        """Remember an event's answer, and forget the oldest where there is no room.

        Args:
            event: token ids.
            answer: token ids.
        """
        one = tuple(set(event[:MAX_TOKENS])), tuple(answer)
        if len(self._seen) < MAX_EVENTS:
            place = len(self._seen)
            self._seen.append(one)
        else:
            place = self._oldest
            self._forget(place)
            self._seen[place] = one
            self._oldest = (place + 1) % MAX_EVENTS
        for token in one[0]:
            self._places[token] = self._places.get(token, 0) | 1 << place
        self._last = ((), ())

    def to(self, event: Sequence[int]) -> Similar:
        """The events that are most like one, and what was answered to them.

        Args:
            event: token ids.
        """
        asked = tuple(event[:MAX_TOKENS])
        if self._last[0] != asked:  # every pass of an answer asks again
            self._last = (asked, self._similar(asked))
        return self._last[1]

    def _forget(self, place: int) -> None:
        for token in self._seen[place][0]:
            left = self._places[token] & ~(1 << place)
            if left:
                self._places[token] = left
            else:
                del self._places[token]

    def _similar(self, event: Tokens) -> Similar:
        events = len(self._seen)
        whole, shared = 0.0, dict[int, float]()
        for token in set(event):
            having = self._places.get(token, 0)
            count = having.bit_count()
            if 2 * count > events:
                continue
            # Inverse document frequency.
            weight = math.log((events + 1) / (max(count, 1) + 0.5))
            whole += weight if count else _NEW * weight
            while having:
                place = having.bit_length() - 1
                having ^= 1 << place
                shared[place] = shared.get(place, 0.0) + weight
        alike = [(weight / whole, place) for place, weight in shared.items() if weight > _LEAST_SHARE * whole]
        alike.sort(reverse=True)
        return tuple((share**_SHARPNESS, self._seen[place][1]) for share, place in alike[:MOST_SIMILAR])
