"""Byte-level BPE from a table that is mapped, not read: a large vocabulary costs neither time nor memory at a start.

The tokenizer's library builds hash maps of every token and every merge: 0.5 s and 55 MB for 150,000 tokens, at each
start, for the few hundred that a plant's events are written with. Here the exporter has sorted the merges once
(`export.checkpoint.token_table`, which also proves that both agree), and the file is searched where it lies. How text
is divided into words stays the library's business, which needs no vocabulary for it. What is left is the merging.

Source: Sennrich, Haddow, Birch, Neural Machine Translation of Rare Words with Subword Units, 2016; tokenizers, `BPE`.
"""

from __future__ import annotations

import heapq
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edge_agent.errors import PermanentError, from_os_error
from edge_agent.runtime.spelling import ByteSpelling, byte_level_alphabet
from edge_agent.runtime.tensors import Tensors, cut_tensors

FORMAT = 1
FACTS = "token_table"
STEPS = ("normalizer", "pre_tokenizer")
"""Of the tokenizer; they stand as they are among the facts."""
MAX_REMEMBERED_WORDS = 4096
MAX_REMEMBERED_CHARACTERS = 64
"""Of a word; longer ones do not come again."""


class TokenTable:
    """A tokenizer of the byte-level BPE family.

    Args:
        path: the table, safetensors: ``pairs`` uint64 (merges,), left << 32 | right, ascending; ``ranks`` and
            ``joined`` uint32 (merges,), how early each is merged and the token that it becomes; ``ends`` uint32
            (tokens,) and ``text`` uint8 (bytes,), the bytes of each token behind those of the one before. Metadata
            `FACTS`, JSON: ``format``, the tokenizer's `STEPS`, and ``control``, the ids that no text may produce.

    Attributes:
        control_ids: ids that no text may produce.
        count: of ids.
        spelling: the bytes behind the tokens.

    Raises:
        PermanentError: ``bundle.unsupported`` when this version cannot use the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            tensors = cut_tensors(np.memmap(path, np.uint8, "r"))
            self._read(tensors)
        except OSError as error:
            raise from_os_error(error, f"reading {path.name}") from error
        except Exception as error:  # of the parser, or the library's bare ones
            raise PermanentError("bundle.unsupported", f"token table cannot be read: {error}") from error
        self._remembered: dict[str, tuple[int, ...]] = {}

    def _read(self, tensors: Tensors) -> None:
        arrays, facts = tensors.arrays, json.loads(tensors.metadata[FACTS])
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}")
        pairs, ranks, joined, ends = (arrays[name] for name in ("pairs", "ranks", "joined", "ends"))
        self.count = len(ends)
        if not len(pairs) == len(ranks) == len(joined) or int(joined.max(initial=0)) >= self.count:
            raise ValueError("its merges do not belong together")
        # Numbers come out of a memoryview as Python's own, three times as fast as out of an array.
        self._pairs, self._ranks, self._joined = (memoryview(numbers.data) for numbers in (pairs, ranks, joined))
        written = _TokenBytes(ends, arrays["text"])
        self.spelling = ByteSpelling(written, written.single())
        ids = {character: self.spelling.id_of_byte(byte) for character, byte in byte_level_alphabet().items()}
        self._ids = {character: token for character, token in ids.items() if token is not None}
        self.control_ids = frozenset(int(number) for number in facts["control"])
        # The library's own steps around an empty vocabulary.
        spec = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        library = Tokenizer.from_str(json.dumps(spec | {step: facts[step] for step in STEPS}))
        self._normalizer, self._words = library.normalizer, library.pre_tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, all of it taken for text."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        ids: list[int] = []
        remembered = self._remembered
        for word, _ in self._words.pre_tokenize_str(text):
            found = remembered.get(word)
            if found is None:
                found = self._merged(word)
                if len(word) <= MAX_REMEMBERED_CHARACTERS:
                    if len(remembered) >= MAX_REMEMBERED_WORDS:
                        remembered.clear()
                    remembered[word] = found
            ids += found
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, control tokens left out."""
        return b"".join(map(self.spelling.bytes_of, ids)).decode("utf-8", errors="replace")

    def _merged(self, word: str) -> tuple[int, ...]:
        """The tokens of a word, in the bytes' disguise: of all pairs the one of lowest rank, until none is left."""
        ids = [self._ids[character] for character in word]
        # A token that was merged into the one before it is -1; `after` and `before` skip it.
        after, before = [*range(1, len(ids) + 1)], [*range(-1, len(ids) - 1)]
        waiting = [
            (rank, place, left, right, joined)
            for place, (left, right) in enumerate(pairwise(ids))
            for rank, joined in self._merge(left, right)
        ]
        heapq.heapify(waiting)
        while waiting:
            _, place, left, right, joined = heapq.heappop(waiting)
            behind = after[place]
            if ids[place] != left or behind == len(ids) or ids[behind] != right:
                continue  # one of the two was merged with another
            ids[place], ids[behind], after[place] = joined, -1, after[behind]
            if after[behind] < len(ids):
                before[after[behind]] = place
            for first, second in ((before[place], place), (place, after[place])):
                if first >= 0 and second < len(ids):
                    for rank, further in self._merge(ids[first], ids[second]):
                        heapq.heappush(waiting, (rank, first, ids[first], ids[second], further))
        return tuple(number for number in ids if number >= 0)

    def _merge(self, left: int, right: int) -> Iterator[tuple[int, int]]:
        """Rank and token of a pair; nothing where it stays two."""
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        if at < len(self._pairs) and self._pairs[at] == pair:
            yield self._ranks[at], self._joined[at]


class _TokenBytes(Mapping[int, bytes]):
    """What each token stands for; tokens that write nothing are not in it.

    Args:
        ends: uint32 (tokens,).
        text: uint8 (bytes,).
    """

    def __init__(self, ends: Any, text: Any) -> None:
        if int(ends[-1]) != len(text) or bool((ends[1:] < ends[:-1]).any()):
            raise ValueError("its tokens' texts do not follow one another")
        self._ends, self._text = ends, text

    def __getitem__(self, token: int) -> bytes:
        if not 0 <= token < len(self._ends):
            raise KeyError(token)
        begin = int(self._ends[token - 1]) if token else 0
        written: bytes = self._text[begin : int(self._ends[token])].tobytes()
        if not written:
            raise KeyError(token)
        return written

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(np.diff(self._ends, prepend=0)).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(np.diff(self._ends, prepend=0)))

    def single(self) -> dict[int, int]:
        """Byte to the token that stands for it alone."""
        alone = np.flatnonzero(np.diff(self._ends, prepend=0) == 1)
        return {int(self._text[int(self._ends[token]) - 1]): int(token) for token in alone}
