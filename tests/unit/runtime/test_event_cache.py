"""What events share is put back exactly as it was computed; what they do not share, never."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.runtime.event_cache import FEWEST_TOKENS, EventCache
from edge_agent.runtime.kv_cache import KvSegment

START = 3
SIZE = 2 * 2 * 4
"""Bytes of one position: two halves, one head, two float32 numbers."""


class Rows:
    """Stands for `KvCache`: a position's numbers are its token and the sum of all before it, as attention would mix."""

    def __init__(self, capacity: int = 64, rows: int = 2) -> None:
        self.kv = np.zeros((2, rows, 1, capacity, 2), np.float32)

    def run(self, row: int, tokens: Sequence[int], seen: int = 0) -> None:
        for place in range(seen, len(tokens)):
            self.kv[:, row, 0, START + place] = (tokens[place], sum(tokens[: place + 1]))

    def read(self, row: int, start: int, end: int) -> KvSegment:
        return self.kv[:, row, :, start:end].copy()

    def write(self, row: int, start: int, segment: KvSegment) -> None:
        self.kv[:, row, :, start : start + segment.shape[2]] = segment


def answer(events: EventCache, rows: Rows, tokens: list[int], row: int = 0) -> int:
    """As an engine does; checks that the row holds what running the whole event would have left."""
    rows.kv[:, row] = -1
    seen = events.restore(rows, row, START, tokens)
    rows.run(row, tokens, seen)
    plain = Rows()
    plain.run(0, tokens)
    assert np.array_equal(rows.read(row, START, START + len(tokens)), plain.read(0, START, START + len(tokens)))
    events.learn(rows, row, START, tokens)
    return seen


def test_the_third_event_of_a_machine_skips_what_the_first_two_shared() -> None:
    events, rows = EventCache(1 << 20), Rows()
    assert answer(events, rows, [1, 2, 3, 4, 5, 6, 7]) == 0
    assert answer(events, rows, [1, 2, 3, 4, 5, 8, 9]) == 0, "nobody knew yet that this much is shared"
    assert answer(events, rows, [1, 2, 3, 4, 5, 6, 9], row=1) == 5
    assert answer(events, rows, [1, 2, 3, 9, 9, 9, 9]) == 0
    assert events.hit_tokens == 5


def test_a_repeated_event_still_runs_its_last_token() -> None:
    events, rows = EventCache(1 << 20), Rows()
    text = [1, 2, 3, 4, 5, 6]
    assert [answer(events, rows, text) for _ in range(3)] == [0, 0, 5], "scores come of running a token"


def test_short_beginnings_are_not_stored() -> None:
    events, rows = EventCache(1 << 20), Rows()
    for last in range(3):
        tokens = [*range(1, FEWEST_TOKENS), 90 + last, 7, 8]
        assert answer(events, rows, tokens) == 0


def test_memory_stays_below_its_bound_and_keeps_the_newest() -> None:
    events, rows = EventCache(12 * SIZE), Rows()
    for machine in range(20):
        for event in range(3):
            answer(events, rows, [machine, 1, 2, 3, 4, 5, 60 + event, 7])
            assert events.stored_bytes <= 12 * SIZE
    assert answer(events, rows, [19, 1, 2, 3, 4, 5, 99, 7]) == 6
    assert answer(events, rows, [2, 1, 2, 3, 4, 5, 99, 7]) == 0


def test_what_most_events_begin_with_outlasts_many_that_few_have() -> None:
    events, rows = EventCache(20 * SIZE), Rows()
    press = [500, 1, 2, 3, 4, 5]
    for turn in range(6):
        answer(events, rows, [*press, 700 + turn, 7])
    # Between two events of the press come five pairs that share a beginning only with each other.
    found = []
    for turn in range(12):
        found.append(answer(events, rows, [*press, 600 + turn, 7]))
        for rare in range(5):
            for last in (8, 9):
                answer(events, rows, [1000 + 10 * turn + rare, 1, 2, 3, 4, 5, last, 7])
    assert found == [len(press)] * 12


def test_what_was_usual_long_ago_makes_room_in_the_end() -> None:
    events, rows = EventCache(12 * SIZE), Rows()
    for turn in range(20):
        answer(events, rows, [500, 1, 2, 3, 4, 5, 600 + turn, 7])
    found = [
        answer(events, rows, [machine, 1, 2, 3, 4, 5, 600 + turn, 7]) for turn in range(40) for machine in (501, 502)
    ]
    assert found[-2:] == [6, 6]


def test_a_cache_of_nothing_stores_nothing() -> None:
    events, rows = EventCache(0), Rows()
    assert [answer(events, rows, [1, 2, 3, 4, 5, 6]) for _ in range(3)] == [0, 0, 0]


def test_cleared_cache_forgets() -> None:
    events, rows = EventCache(1 << 20), Rows()
    for _ in range(3):
        answer(events, rows, [1, 2, 3, 4, 5, 6])
    events.clear()
    assert answer(events, rows, [1, 2, 3, 4, 5, 6]) == 0
    assert events.stored_bytes == 0


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=60),
    limit=st.integers(0, 40),
)
def test_any_sequence_of_events_leaves_what_running_them_would(texts: list[list[int]], limit: int) -> None:
    events, rows = EventCache(limit * SIZE), Rows()
    for number, text in enumerate(texts):
        answer(events, rows, text, row=number % 2)
        assert events.stored_bytes <= limit * SIZE
