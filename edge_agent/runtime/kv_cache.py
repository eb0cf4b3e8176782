"""Keys and values in place, and the passes that write them.

A cache is allocated once at its full capacity. The same buffer is bound as ``past`` input and ``present`` output, and
the attention mask's length alone says how much of it counts. So rolling back is setting a smaller length, and a
cached prompt prefix is a length to return to.

A cache of several rows holds several texts that begin alike: the prefix is computed once and copied. Rows that
continue together share a pass, each by its own number of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.contract.manifest import ModelSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.buffers import bind, on_device, untouched
from edge_agent.runtime.drafts import MAX_DRAFT_TOKENS
from edge_agent.runtime.library_errors import mapped
from edge_agent.runtime.pass_limit import PassLimit
from edge_agent.runtime.providers import CACHE_DEVICES

KV_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
MAX_SCORES = 128
"""Positions that one pass can score: the choices of a few answers."""
MAX_PASS_TOKENS = 512
"""Tokens that one row runs in a pass; longer texts take several. It bounds what attention holds of a row between its
two products, heads x tokens x capacity: 29 MB for 14 heads and a capacity of 1024."""

_UNSEEN = np.float32(-1e30)
"""Added to a score of attention it leaves a weight of exactly 0."""

Logits = NDArray[np.float32]
Adapter = dict[str, Any]
"""A task's low-rank matrices by input name, as values of ONNX Runtime; empty where the graph takes none."""
KvSegment = NDArray[Any]
"""Keys and values of consecutive positions of one row: (2 * layers, kv_heads, positions, head_dim)."""


@dataclass(frozen=True)
class RowPass:
    """What one row contributes to a pass.

    Args:
        row: which row of the cache.
        past: positions of the row that count; what lies behind them is overwritten.
        tokens: ids of the next positions, at least one.
        score_at: offsets into ``tokens`` after which scores are wanted, ascending.
        follows: of the last tokens, where they do not simply follow one another: for each the place among them of the
            token that it follows, -1 for what stands before them. Only for a pass of one row, where the graph takes it.
    """

    row: int
    past: int
    tokens: Sequence[int]
    score_at: Sequence[int]
    follows: Sequence[int] = ()


@dataclass(frozen=True)
class LoadedGraphs:
    """A model in ONNX Runtime.

    Args:
        decoder: its session.
        head: the head's session, where it is apart, else None.
        spec: the model's shape.
        limit: ends passes that take too long.
        head_rows: tokens that the head scores.
    """

    decoder: Any
    head: Any
    spec: ModelSpec
    limit: PassLimit
    head_rows: int


class Head:
    """The output head as a graph of its own, with the buffers between it and the decoder.

    Args:
        graphs: the loaded model; its head maps ``hidden`` to ``logits``.
        scores: positions that it scores at once, at most.
    """

    def __init__(self, graphs: LoadedGraphs, scores: int) -> None:
        self._session = graphs.head
        self._run_options = graphs.limit.run_options
        size = self._session.get_inputs()[0].shape[2]
        self.hidden: Logits = untouched((scores, 1, size), np.float32)  # (scores, 1, hidden): the decoder writes here
        self.logits: Logits = untouched((scores, 1, graphs.head_rows), np.float32)
        self._binding: Any = self._session.io_binding()

    def score(self, count: int) -> None:
        """Compute the first ``count`` rows of ``logits`` from those of ``hidden``."""
        bind(self._binding, "input", "hidden", self.hidden, (count, *self.hidden.shape[1:]))
        bind(self._binding, "output", "logits", self.logits, (count, *self.logits.shape[1:]))
        mapped("running the model", lambda: self._session.run_with_iobinding(self._binding, self._run_options))


class KvCache:
    """Keys and values of a few token sequences of one task, and the buffers of their passes.

    Args:
        graphs: the loaded model.
        capacity_tokens: most positions that a row can hold.
        rows: sequences; more than one only where the graph takes ``score_at``.
        adapter: bound for good: a cache holds keys and values of one task's weights.

    Attributes:
        length: positions of row 0 that count for `forward` and `append`.
        passes: that were run so far.

    Raises:
        PermanentError: ``worker.out_of_memory``.
    """

    def __init__(self, graphs: LoadedGraphs, capacity_tokens: int, rows: int, adapter: Adapter) -> None:
        spec, session, head_rows = graphs.spec, graphs.decoder, graphs.head_rows
        self.capacity_tokens = capacity_tokens
        self.rows = rows
        self._shared_tokens = 0
        self._shared_rows = 1
        self.length = 0
        self.passes = 0
        self.scores_many = bool(spec.score_at)
        device = CACHE_DEVICES.get(session.get_providers()[0], "cpu")
        self.takes_alternatives = bool(spec.alternatives) and device == "cpu"
        self._session = session
        self._spec = spec
        self._adapter = adapter  # the bindings do not keep it alive
        self._run_options = graphs.limit.run_options
        scores = MAX_SCORES if self.scores_many else 1
        shape = (2 * spec.num_layers, rows, spec.num_kv_heads, capacity_tokens, spec.head_dim)
        try:
            self._kv: KvSegment = untouched(shape, KV_DTYPES[spec.kv_dtype])
            self._ids = np.zeros((rows, capacity_tokens), np.int64)
            self._mask = np.zeros((rows, capacity_tokens), np.int64)
            self._counts = np.zeros(rows, np.int32)  # (rows,): real tokens of each row of the pass
            self._score_at = np.zeros((scores, 2), np.int64)
            self._positions = np.zeros((rows, capacity_tokens), np.int64)
            self._bias = untouched((self._bias_size(MAX_PASS_TOKENS + MAX_DRAFT_TOKENS),), np.float32)
            self._head = Head(graphs, scores) if graphs.head is not None else None
            self._logits: Logits = self._head.logits if self._head else untouched((scores, 1, head_rows), np.float32)
        except (MemoryError, OSError) as error:  # OSError: of the mapping
            raise PermanentError(
                "worker.out_of_memory", f"no memory for a cache of {rows} x {capacity_tokens} tokens"
            ) from error
        # A graph reads its inputs where it runs. What is bound from elsewhere is copied there once, when it is bound:
        # a cache on the wrong side would stay as empty as it began.
        self._elsewhere = [] if device == "cpu" else [on_device(half, device) for half in self._kv]
        self._bindings: dict[tuple[int, int], Any] = {}

    def rewind(self, length: int) -> None:
        """Forget every position of row 0 from ``length`` on."""
        if not 0 <= length <= self.length:
            raise PermanentError("worker.context", f"cannot rewind from {self.length} to {length} tokens")
        self.length = length

    def forward(self, tokens: Sequence[int]) -> Logits:
        """Append ``tokens`` to row 0 in one pass.

        Args:
            tokens: ids of the next positions, at least one.

        Returns:
            Logits after the last of them, float32 (head rows,): a view that the next pass overwrites.

        Raises:
            PermanentError: ``worker.context`` when they do not fit, ``worker.out_of_memory``, ``worker.inference``.
        """
        self.append(tokens)
        if self._head is not None:
            self._head.score(1)
        logits: Logits = self._logits[0, 0]
        return logits

    def append(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` in one pass whose scores nobody needs: where the head is apart, it is not run.

        Args:
            tokens: ids of the next positions, at least one.

        Raises:
            PermanentError: as `forward`.
        """
        self._check_fit(self.length, len(tokens))
        one = self._run_beginning(RowPass(0, self.length, tokens, [len(tokens) - 1]))
        self._write_pass([one])
        self.length += len(tokens)

    def run(self, passes: Sequence[RowPass]) -> list[Logits]:
        """Continue neighbouring rows together.

        Args:
            passes: one for each row from the first to the last, ascending without a gap; in all at most `MAX_SCORES`
                scores. Only a graph with ``score_at`` takes more than one row, or scores elsewhere than at the end.

        Returns:
            For each pass its scores, float32 (scores, head rows): views that the next pass overwrites.

        Raises:
            PermanentError: as `forward`.
        """
        for one in passes:
            self._check_fit(one.past, len(one.tokens))
        self._write_pass([self._run_beginning(one) for one in passes])
        starts = [0, *itertools.accumulate(len(one.score_at) for one in passes)]
        if self._head is not None:
            self._head.score(starts[-1])
        scores = self._logits[: starts[-1], 0]  # (scores, head rows)
        return [scores[start:end] for start, end in itertools.pairwise(starts)]

    @property
    def is_in_memory(self) -> bool:
        """Whether positions can be read and written here; a GPU's caches cannot."""
        return not self._elsewhere

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of keys and values."""
        return self._kv.dtype

    def segment_shape(self, tokens: int) -> tuple[int, int, int, int]:
        """Shape of ``tokens`` positions as `read` gives them."""
        halves, _, heads, _, size = self._kv.shape
        return halves, heads, tokens, size

    def read(self, row: int, start: int, end: int) -> KvSegment:
        """A copy of positions ``start`` to ``end`` of a row, (2 * layers, kv_heads, end - start, head_dim)."""
        return self._kv[:, row, :, start:end].copy()

    def write(self, row: int, start: int, segment: KvSegment) -> None:
        """Put positions back that `read` took."""
        self._kv[:, row, :, start : start + segment.shape[2]] = segment

    def share(self, length: int) -> None:
        """Let every row begin with the first ``length`` positions of row 0, which stay as they are from now on."""
        self._shared_tokens = length
        self._shared_rows = 1

    def _reach(self, row: int) -> None:
        """Bring the shared beginning into every row up to ``row``: not before it is used, for it takes memory."""
        while self._shared_rows <= row:
            beginning = self._kv[:, 0, :, : self._shared_tokens]
            self._kv[:, self._shared_rows, :, : self._shared_tokens] = beginning
            self._shared_rows += 1

    def _run_beginning(self, one: RowPass) -> RowPass:
        """Run what is too long for one pass, up to the first score that is wanted, and return the rest."""
        while len(one.tokens) > MAX_PASS_TOKENS and one.score_at[0] >= MAX_PASS_TOKENS:
            beginning, rest = one.tokens[:MAX_PASS_TOKENS], one.tokens[MAX_PASS_TOKENS:]
            self._write_pass([RowPass(one.row, one.past, beginning, [MAX_PASS_TOKENS - 1])])
            score_at = [at - MAX_PASS_TOKENS for at in one.score_at]
            one = RowPass(one.row, one.past + MAX_PASS_TOKENS, rest, score_at, one.follows)
        return one

    def _in_company(self, passes: Sequence[RowPass]) -> Sequence[RowPass]:
        """A pass of single tokens with each of them twice, the second for nothing.

        Attention in floats multiplies a single row by another kernel, which adds up in another order. Of two rows and
        more each is the same bits whatever is beside it: so no answer depends on how its tokens were split into passes.
        """
        alone = all(len(one.tokens) == 1 and one.past + 2 <= self.capacity_tokens for one in passes)
        if not alone or not self.scores_many or self._kv.dtype == np.int8:
            return passes
        return [replace(one, tokens=[*one.tokens, *one.tokens]) for one in passes]

    def _write_pass(self, passes: Sequence[RowPass]) -> None:
        passes = self._in_company(passes)
        longest = max(len(one.tokens) for one in passes)
        self._reach(passes[-1].row)
        for one in passes:
            # The kernel may write a row's padding, too: it must fall inside the row.
            self._check_fit(one.past, longest)
        ends = [one.past + len(one.tokens) for one in passes]
        first, count = passes[0].row, len(passes)
        # A pass of fewer rows reads these buffers as if they were narrower: (count, longest) and (count, total).
        ids = self._ids.reshape(-1)[: count * longest].reshape(count, longest)
        mask = self._mask.reshape(-1)[: count * max(ends)].reshape(count, max(ends))
        ids[:], mask[:] = 0, 0
        places = [(row, at) for row, one in enumerate(passes) for at in one.score_at]
        for row, one in enumerate(passes):
            ids[row, : len(one.tokens)] = one.tokens
            mask[row, : ends[row]] = 1
            self._counts[row] = len(one.tokens)
        self._score_at[: len(places)] = places
        if not self.takes_alternatives:
            self._run_bound(first, count, longest, max(ends), len(places))
            return
        positions = self._positions.reshape(-1)[: count * longest].reshape(count, longest)
        positions[:] = np.arange(longest)
        positions += np.array([[one.past] for one in passes])
        self._check_bias(longest)
        hidden = self._hide_alternatives(passes[0], positions[0])
        try:
            self._run_bound(first, count, longest, max(ends), len(places))
        finally:
            hidden[:] = 0

    def _bias_size(self, tokens: int) -> int:
        """Numbers of a bias for so many tokens: zeros but while a pass holds alternatives; unwritten they are free."""
        return max(1, min(tokens, self.capacity_tokens) * self.capacity_tokens)

    def _check_bias(self, tokens: int) -> None:
        if self._bias_size(tokens) > self._bias.size:
            raise PermanentError("worker.context", f"a pass of {tokens} tokens that is scored early is too long")

    def _hide_alternatives(self, one: RowPass, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Let the last tokens of a pass see only what they follow, and count their positions from there.

        Returns:
            The part of the bias that is other than zero.
        """
        count, first = len(one.tokens), len(one.tokens) - len(one.follows)
        bias = self._bias[: count * (one.past + count)].reshape(count, one.past + count)
        sees = np.zeros((len(one.follows), len(one.follows)), bool)
        for place, before in enumerate(one.follows):
            if before >= 0:
                sees[place] = sees[before]
            positions[first + place] = (positions[first + before] if before >= 0 else one.past + first - 1) + 1
            sees[place, place] = True
        hidden: NDArray[np.float32] = bias[first:, one.past + first :]
        hidden[:] = np.where(sees, np.float32(0), _UNSEEN)
        return hidden

    def _check_fit(self, past: int, count: int) -> None:
        if not 0 < count <= self.capacity_tokens - past:
            raise PermanentError("worker.context", f"{past + count} tokens do not fit in {self.capacity_tokens}")

    def _run_bound(self, first: int, count: int, tokens: int, total: int, scores: int) -> None:
        binding = self._binding(first, count)
        # Only these change their shape from pass to pass.
        bind(binding, "input", "input_ids", self._ids, (count, tokens))
        bind(binding, "input", "attention_mask", self._mask, (count, total))
        if self.scores_many:
            bind(binding, "input", "score_at", self._score_at, (scores, 2))
        if self.takes_alternatives:
            bind(binding, "input", "position_ids", self._positions, (count, tokens))
            bind(binding, "input", "attention_bias", self._bias, (1, 1, tokens, total))
        if self._head is None:
            bind(binding, "output", "logits", self._logits, (scores, 1, self._logits.shape[2]))
        else:
            bind(binding, "output", "hidden", self._head.hidden, (scores, 1, self._head.hidden.shape[2]))
        self.passes += 1
        # A pass that fails half-way has written only behind what counts, where the next one writes again.
        mapped("running the model", lambda: self._session.run_with_iobinding(binding, self._run_options))

    def _binding(self, first: int, count: int) -> Any:
        """The bound caches of ``count`` rows from ``first`` on: bound once, for they never move."""
        found = self._bindings.get((first, count))
        if found is not None:
            return found
        binding: Any = self._session.io_binding()
        names = [f"{layer}.{half}" for layer in range(self._spec.num_layers) for half in ("key", "value")]
        for place, name in enumerate(names):
            if self._elsewhere:
                binding.bind_ortvalue_input(f"past_key_values.{name}", self._elsewhere[place])
                binding.bind_ortvalue_output(f"present.{name}", self._elsewhere[place])
            else:
                rows = self._kv[place, first : first + count]  # (count, kv_heads, capacity, head_dim), contiguous
                bind(binding, "input", f"past_key_values.{name}", rows, rows.shape)
                bind(binding, "output", f"present.{name}", rows, rows.shape)
        for name, matrix in self._adapter.items():
            binding.bind_ortvalue_input(name, matrix)
        if self._spec.ragged:
            bind(binding, "input", "query_seqlens", self._counts, (count,))
        self._bindings[first, count] = binding
        return binding
