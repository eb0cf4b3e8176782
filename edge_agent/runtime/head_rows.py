"""Which token each row of the output head scores: all of them, or those that a pruned head kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import PermanentError, from_os_error


class HeadRows:
    """The tokens that can be chosen.

    Args:
        vocab_size: token ids of the tokenizer.
        ids: the token id of each row, none twice; None: every token, each in its place.

    Attributes:
        whole: whether every token has the row of its own number.

    Raises:
        PermanentError: ``bundle.unsupported`` when an id comes twice or is none of the vocabulary.
    """

    def __init__(self, vocab_size: int, ids: NDArray[np.int32] | None = None) -> None:
        self.vocab_size = vocab_size
        self.whole = ids is None
        self.ids: NDArray[np.int64] = np.arange(vocab_size) if ids is None else ids.astype(np.int64)  # (rows,)
        self._rows = self._ascending = known = self.ids
        if ids is not None:
            self._rows = np.argsort(self.ids)  # (rows,): of the tokens in ascending order
            self._ascending = known = self.ids[self._rows]
        if not len(known) or known[0] < 0 or known[-1] >= vocab_size or bool((np.diff(known) == 0).any()):
            raise PermanentError("bundle.unsupported", f"the head's rows are no different tokens below {vocab_size}")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, token: int) -> bool:
        return bool(_are_among(np.array([token]), self._ascending)[0])

    def kept(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of ``ids`` (options,), ascending, that can be chosen."""
        if self.whole:
            return ids
        few, many = sorted((ids, self._ascending), key=len)  # in open text nearly every token may come next
        return few[_are_among(few, many)]

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the logits that score ``ids`` (options,), all of which can be chosen."""
        return ids if self.whole else self._rows[np.searchsorted(self._ascending, ids)]


def _are_among(ids: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.bool_]:
    # Searched, not looked up: a row for every token of the vocabulary would be a megabyte.
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.equal(known[places], ids)


def read_head_rows(vocab_size: int, file: Path | None) -> HeadRows:
    """Read the head's tokens.

    Args:
        vocab_size: token ids of the tokenizer.
        file: the token id of each row, int32 little-endian; None: the head is whole.

    Raises:
        PermanentError: ``bundle.unsupported`` or ``disk.*``.
    """
    if file is None:
        return HeadRows(vocab_size)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"reading {file.name}") from error
    if len(raw) % 4:
        raise PermanentError("bundle.unsupported", f"{file.name} holds no whole number of token ids")
    return HeadRows(vocab_size, np.frombuffer(raw, "<i4"))
