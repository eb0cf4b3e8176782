"""Keys and values of events' beginnings: what a machine's next event shares with its last ones is not run again.

A task's template puts the stable lines first (machine, code, state), so events of one plant begin alike. The cache
remembers the tokens of recent events, and keeps keys and values only of beginnings that came twice: most events share
something, few share all. Everything is found by token ids, all of which must agree; keys and values of a position
depend on nothing behind it, so what is put back is what a pass over the same tokens would have written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_agent.runtime.kv_cache import KvSegment

FEWEST_TOKENS = 4
"""Shorter beginnings are not worth a copy."""
MAX_EVENTS = 128
"""Events whose tokens are remembered, without their keys and values: some 300 bytes a token."""


class Positions(Protocol):
    """Keys and values that can be taken out and put back; the real ones are those of `KvCache`."""

    def read(self, row: int, start: int, end: int) -> KvSegment:
        """As `KvCache.read`."""

    def write(self, row: int, start: int, segment: KvSegment) -> None:
        """As `KvCache.write`."""


@dataclass(eq=False, slots=True)
class _Node:
    """A token of a remembered event."""

    parent: _Node | None = None
    token: int = -1
    depth: int = 0
    events: int = 0
    after: dict[int, _Node] = field(default_factory=dict)
    stored: _Stored | None = None


@dataclass(eq=False, slots=True)
class _Stored:
    """Keys and values from the end of another stored beginning (or from the first token) up to here.

    Args:
        node: where it ends.
        before: the stored beginning that it continues.
        segment: (2 * layers, kv_heads, tokens, head_dim).
        users: stored beginnings that continue this one.
        uses: how often it was stored or put back.
        rank: among those that are kept; the lowest goes first.
    """

    node: _Node
    before: _Stored | None
    segment: KvSegment
    users: int = 0
    uses: int = 0
    rank: float = 0.0


class EventCache:
    """Beginnings of one task's events.

    Args:
        limit_bytes: of keys and values; 0 stores nothing.

    Attributes:
        hit_tokens: tokens that were not run again, since the start.
        stored_bytes: keys and values that are held.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.hit_tokens = 0
        self._limit_bytes = limit_bytes
        self.stored_bytes = 0
        self._root = _Node()
        self._stored: dict[_Stored, None] = {}
        self._age = 0.0
        self._events: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def restore(self, cache: Positions, row: int, start: int, tokens: Sequence[int]) -> int:
        """Put the longest stored beginning of ``tokens`` into a row.

        Args:
            cache: where to.
            row: which row.
            start: position of the event's first token, behind the prefix.
            tokens: ids of the event.

        Returns:
            How many tokens need not be run; fewer than all.
        """
        node, found = self._root, None
        for token in tokens[: len(tokens) - 1]:
            following = node.after.get(token)
            if following is None:
                break
            node = following
            found = node.stored or found
        if found is None:
            return 0
        way = _way(found)
        at = start
        for stored in way:
            cache.write(row, at, stored.segment)
            at += stored.segment.shape[2]
            self._use(stored)
        self.hit_tokens += at - start
        return at - start

    def learn(self, cache: Positions, row: int, start: int, tokens: Sequence[int]) -> None:
        """Remember an event that a row holds, and store what it shares with an earlier one.

        Args:
            cache: holds keys and values of the whole event.
            row: which row.
            start: position of the event's first token.
            tokens: ids of the event.
        """
        if not self._limit_bytes:
            return
        node, shared, last = self._root, 0, None
        for token in tokens[: len(tokens) - 1]:
            following = node.after.get(token)
            if following is None:
                break
            node, shared = following, shared + 1
            last = node.stored or last
        known = last.node.depth if last else 0
        if shared - known >= FEWEST_TOKENS:
            self._store(node, last, cache.read(row, start + known, start + shared))
        self._remember(tuple(tokens))

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Node()
        self._stored.clear()
        self._events.clear()
        self.stored_bytes = 0

    def _store(self, node: _Node, before: _Stored | None, segment: KvSegment) -> None:
        node.stored = stored = _Stored(node, before, segment)
        if before is not None:
            before.users += 1
        self._stored[stored] = None
        self._use(stored)
        self.stored_bytes += segment.nbytes
        while self.stored_bytes > self._limit_bytes:
            # What others continue stays as long as they do.
            lowest = min((one for one in self._stored if not one.users), key=lambda one: one.rank)
            self._age = lowest.rank
            self._drop(lowest)

    def _use(self, stored: _Stored) -> None:
        """Rank by uses, counted from what was dropped last: what was used often stays longer, but not for ever.

        Source: LFU with dynamic aging (Arlitt et al., 2000). Of what was used last alone, one plant's many rare
        beginnings would drive out the few that most of its events have.
        """
        stored.uses += 1
        stored.rank = self._age + stored.uses

    def _drop(self, stored: _Stored) -> None:
        del self._stored[stored]
        self.stored_bytes -= stored.segment.nbytes
        stored.node.stored = None
        if stored.before is not None:
            stored.before.users -= 1
        _prune(stored.node)

    def _remember(self, tokens: tuple[int, ...]) -> None:
        if tokens in self._events:
            self._events.move_to_end(tokens)
            return
        self._events[tokens] = None
        node = self._root
        for token in tokens:
            following = node.after.get(token)
            if following is None:
                following = node.after[token] = _Node(node, token, node.depth + 1)
            node = following
        node.events += 1
        if len(self._events) > MAX_EVENTS:
            oldest, _ = self._events.popitem(last=False)
            end = self._root
            for token in oldest:
                end = end.after[token]
            end.events -= 1
            _prune(end)


def _way(stored: _Stored) -> list[_Stored]:
    """The stored beginnings that lead up to one, first to last."""
    way = [stored]
    while way[-1].before is not None:
        way.append(way[-1].before)
    return way[::-1]


def _prune(node: _Node) -> None:
    """Remove a token that no event, no stored beginning and no later token needs, and those before it likewise."""
    while node.parent is not None and not (node.after or node.events or node.stored):
        del node.parent.after[node.token]
        node = node.parent
