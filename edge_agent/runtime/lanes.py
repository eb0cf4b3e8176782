"""Several answers at once: which of them share a pass, and who gets which scores.

A pass has a fixed cost, and a part for each token. Short passes (a chosen token and what it forces) are mostly fixed
cost, so rows that wait for one run together; long ones (events) run alone, because padding the shorter to the longer
would cost more than it saves. Which is which follows from measured passes. A row's scores do not depend on the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from edge_agent.errors import EdgeError
from edge_agent.runtime.decoder import Ask, Lane
from edge_agent.runtime.drafts import PassCost
from edge_agent.runtime.kv_cache import MAX_PASS_TOKENS, MAX_SCORES, Logits, RowPass


class Rows(Protocol):
    """A cache whose rows continue together; the real one is `KvCache`."""

    @property
    def capacity_tokens(self) -> int:
        """Most positions that a row can hold."""

    def run(self, passes: Sequence[RowPass]) -> list[Logits]:
        """As `KvCache.run`."""


Waiting = list[tuple[int, Ask]]
"""Rows and what they need, in the order of rows."""


def run_lanes(
    cache: Rows, start: int, lanes: Sequence[Lane], cost: PassCost, *, alternatives: bool = False
) -> list[EdgeError | None]:
    """Answer until every lane has its answer or its fault.

    Args:
        cache: lane n is its row n; every row holds the same prefix.
        start: length of the prefix.
        lanes: at most as many as there are rows.
        cost: of passes; learns from each one.
        alternatives: whether a pass of one row may hold several guesses at the same token.

    Returns:
        For each lane what kept it from an answer; one lane's fault is no other's.
    """
    faults: list[EdgeError | None] = [None] * len(lanes)
    while waiting := _waiting(lanes, faults, alternatives=alternatives):
        for group in grouped(waiting, cost.fixed_tokens, cache.capacity_tokens - start):
            _run(cache, start, group, lanes, faults, cost)
    return faults


def grouped(waiting: Waiting, fixed_tokens: float, room_tokens: int) -> Iterator[Waiting]:
    """Neighbouring rows whose common pass is cheaper than passes of their own.

    Args:
        waiting: rows and what they need.
        fixed_tokens: tokens that cost as much as the fixed part of a pass.
        room_tokens: positions of a row behind the prefix; padding must fall inside it.
    """
    group: Waiting = []
    for row, ask in waiting:
        if group and not _joins(group, row, ask, fixed_tokens, room_tokens):
            yield group
            group = []
        group.append((row, ask))
    if group:
        yield group


def _joins(group: Waiting, row: int, ask: Ask, fixed_tokens: float, room_tokens: int) -> bool:
    if row != group[-1][0] + 1:
        return False  # caches of a pass lie side by side
    asks = [other for _, other in group] + [ask]
    longest = max(len(one.tokens) for one in asks)
    before = max(len(one.tokens) for one in asks[:-1])
    # What all rows pay together beyond what the newcomer's own pass would have cost.
    padding = (longest - before) * len(group) + longest - len(ask.tokens)
    fits = max(one.keep for one in asks) + longest <= room_tokens
    return fits and padding < fixed_tokens and sum(len(one.score_at) for one in asks) <= MAX_SCORES


def _waiting(lanes: Sequence[Lane], faults: list[EdgeError | None], *, alternatives: bool) -> Waiting:
    unfinished = [row for row, lane in enumerate(lanes) if lane.decoded is None and faults[row] is None]
    company = len(unfinished)
    # Rows that share a pass gain more than one that tries two ways at once.
    alternatives = alternatives and company == 1
    waiting: Waiting = []
    for row in unfinished:
        try:
            waiting.append((row, lanes[row].ask(alternatives=alternatives, company=company)))
        except EdgeError as error:
            faults[row] = error
    return waiting


def _run(
    cache: Rows,
    start: int,
    group: Waiting,
    lanes: Sequence[Lane],
    faults: list[EdgeError | None],
    cost: PassCost,
) -> None:
    began_s = time.monotonic()
    try:
        scores = cache.run(
            [RowPass(row, start + ask.keep, ask.tokens, ask.score_at, ask.follows) for row, ask in group]
        )
    except EdgeError as error:
        for row, _ in group:
            faults[row] = error
        return
    longest = max(len(ask.tokens) for _, ask in group)
    if longest <= MAX_PASS_TOKENS:  # else it was several passes
        cost.learn(len(group) * longest, time.monotonic() - began_s)
    for (row, ask), found in zip(group, scores, strict=True):
        try:
            lanes[row].take(ask, found)
        except EdgeError as error:
            faults[row] = error
