"""Models for the decoder that are functions, not networks: scores follow from the tokens alone."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class HashModel:
    """Scores depend on every token so far and on nothing else, so any split into passes must give the same answer."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._seed = seed
        self.tokens: list[int] = []
        self.passes = 0

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        assert tokens, "a pass without tokens"
        self.passes += 1
        self.tokens.extend(tokens)
        return self.scores_after(self.tokens)

    def scores_after(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 (vocab,)"""
        state = zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes(), self._seed)
        return np.random.default_rng(state).normal(0, 3, self._vocab_size).astype(np.float32)


class ConstantScores:
    """Gives the same scores at every step."""

    def __init__(self, scores: NDArray[np.float32]) -> None:
        self._scores = scores

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._scores


class SlowModel(HashModel):
    """Every pass ends after ``deadline_at_s`` (a monotonic time)."""

    def __init__(self, vocab_size: int, deadline_at_s: float) -> None:
        super().__init__(vocab_size)
        self._deadline_at_s = deadline_at_s

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        while time.monotonic() <= self._deadline_at_s:
            time.sleep(0.001)
        return super().forward(tokens)
