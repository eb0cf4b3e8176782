"""Answers to events that were answered before: in an alarm flood, most events are.

Greedy decoding gives equal prompts equal answers, so nothing is lost by remembering them. The key is the rendered
event: what the template leaves out (time stamps, ids) does not tell events apart, because the model would not see it
either. Model and task are those of the engine that holds the cache. Guards are not remembered: they read the event's
own fields, and run for every event.
"""

from __future__ import annotations

from collections import OrderedDict

from edge_agent.runtime.decoder import Decoded

_ENTRY_BYTES = 1500
"""Of the interpreter's, for one answer beside its texts; measured with five fields."""


class DecisionCache:
    """A bounded number of answers of one task, the least recently used forgotten first.

    Args:
        limit_bytes: of memory, estimated; 0 remembers nothing.

    Attributes:
        hits: answers that were given from memory.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.hits = 0
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._answers: OrderedDict[str, Decoded] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, rendered: str) -> Decoded | None:
        """The answer to a rendered event, if it is remembered."""
        found = self._answers.get(rendered)
        if found is not None:
            self._answers.move_to_end(rendered)
            self.hits += 1
        return found

    def put(self, rendered: str, decoded: Decoded) -> None:
        """Remember an answer."""
        if rendered in self._answers or _size_bytes(rendered, decoded) > self._limit_bytes:
            return
        self._answers[rendered] = decoded
        self._bytes += _size_bytes(rendered, decoded)
        while self._bytes > self._limit_bytes:
            self._bytes -= _size_bytes(*self._answers.popitem(last=False))

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()
        self._bytes = 0


def _size_bytes(rendered: str, decoded: Decoded) -> int:
    texts = sum(len(value) for value in decoded.values.values() if isinstance(value, str))
    # A character outside Latin-1 takes up to four bytes.
    return _ENTRY_BYTES + 4 * (len(rendered) + texts) + 8 * len(decoded.tokens)
