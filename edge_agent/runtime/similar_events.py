"""Earlier events that are much like a new one: what was answered to them is what will probably be answered to it.

A gateway hears from the same few machines, and one machine's complaint reads like its last one. Which tokens two events
share tells how much alike they are: a rare token tells much, and one that most events have nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

MAX_EVENTS = 128
"""Events that are remembered, the latest: some 5 KB each."""
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
        self._answers: OrderedDict[int, tuple[Tokens, Tokens]] = OrderedDict()  # number -> (distinct tokens, answer)
        self._numbers: dict[int, set[int]] = {}  # token -> numbers of the events that have it
        self._next = 0
        self._last: tuple[Tokens, Similar] = ((), ())

    def __len__(self) -> int:
        return len(self._answers)

    def remembered_tokens(self) -> int:
        """Different tokens that the remembered events have."""
        return len(self._numbers)

    def learn(self, event: Sequence[int], answer: Sequence[int]) -> None:
        """Remember an event's answer, and forget the oldest where there is no room.

        Args:
            event: token ids.
            answer: token ids.
        """
        if len(self._answers) == MAX_EVENTS:
            oldest, (tokens, _) = self._answers.popitem(last=False)
            for token in tokens:
                numbers = self._numbers[token]
                numbers.discard(oldest)
                if not numbers:
                    del self._numbers[token]
        distinct = tuple(set(event[:MAX_TOKENS]))
        for token in distinct:
            self._numbers.setdefault(token, set()).add(self._next)
        self._answers[self._next] = (distinct, tuple(answer))
        self._next += 1
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

    def _similar(self, event: Tokens) -> Similar:
        events = len(self._answers)
        whole, shared = 0.0, dict[int, float]()
        for token in set(event):
            having = self._numbers.get(token, ())
            if 2 * len(having) > events:
                continue
            # Inverse document frequency.
            weight = math.log((events + 1) / (max(len(having), 1) + 0.5))
            whole += weight if having else _NEW * weight
            for number in having:
                shared[number] = shared.get(number, 0.0) + weight
        alike = [(weight / whole, number) for number, weight in shared.items() if weight > _LEAST_SHARE * whole]
        alike.sort(reverse=True)
        return tuple((share**_SHARPNESS, self._answers[number][1]) for share, number in alike[:MOST_SIMILAR])
