"""The model in fixed windows: graph interface 2 of `edge_agent.contract.manifest.ModelSpec`, for NPUs.

An accelerator's program has every shape fixed: so many tokens a pass, so many positions of past. The past lies here, on
the host, as one window per cache; a pass reads it, hides what is not yet written (or was rewound) by the bias, and
brings back keys and values of its own positions only. Text longer than the widest graph takes several passes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.contract.manifest import MASKED_BIAS, ModelSpec, Target
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.runtime.head_rows import read_head_rows
from edge_agent.runtime.kv_cache import Logits
from edge_agent.runtime.library_errors import map_library_error
from edge_agent.runtime.pass_limit import PassLimit
from edge_agent.runtime.providers import check_loaded, use_provider

PADDING_ID = 0
"""Fills the rest of a window; any id will do, for nothing that counts can see it."""


@dataclass(frozen=True)
class Window:
    """One loaded graph.

    Args:
        tokens: positions a pass.
        session: the graph in ONNX Runtime.
    """

    tokens: int
    session: Any


class StaticSession:
    """The loaded graphs of a static model.

    Args:
        folder: a verified bundle's directory, or where an exporter laid the graphs out in the same way.
        spec: which files to load, and the shapes that they must have.
        target: what runs them.
        threads: intra-op threads of what runs on the CPU, at least 1.

    Raises:
        IntegrityError: ``bundle.file_missing`` or ``bundle.file_corrupt``.
        PermanentError: ``bundle.unsupported`` (operator, provider or shape), ``worker.out_of_memory``.
    """

    def __init__(self, folder: Path, spec: ModelSpec, target: Target, threads: int) -> None:
        if spec.windows is None or spec.past_tokens is None:
            raise PermanentError("bundle.unsupported", "the manifest describes no static windows")
        self.spec = spec
        self.limit = PassLimit()
        self.past_tokens = spec.past_tokens
        # Narrowest first, as they are searched.
        ordered = sorted(spec.windows, key=lambda window: window.tokens)
        self.windows = tuple(Window(window.tokens, _load(folder / window.graph, target, threads)) for window in ordered)
        rows = len(read_head_rows(spec.vocab_size, folder / spec.head_ids if spec.head_ids else None))
        for window in self.windows:
            _check_interface(window, spec, self.past_tokens, rows)
        self.providers: tuple[str, ...] = tuple(self.windows[0].session.get_providers())
        check_loaded(target, self.providers)

    def new_cache(self, capacity_tokens: int) -> StaticCache:
        """Allocate a past window of which at most ``capacity_tokens`` positions are used.

        Raises:
            PermanentError: ``worker.context`` beyond the window, ``worker.out_of_memory``.
        """
        return StaticCache(self, capacity_tokens)


class StaticCache:
    """Keys and values of one token sequence.

    Args:
        session: the loaded graphs.
        capacity_tokens: most positions it can hold; the graphs' past window at most.
    """

    def __init__(self, session: StaticSession, capacity_tokens: int) -> None:
        if capacity_tokens > session.past_tokens:
            raise PermanentError(
                "worker.context", f"{capacity_tokens} tokens exceed the static window of {session.past_tokens}"
            )
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self._session = session
        spec = session.spec
        shape = (1, spec.num_kv_heads, session.past_tokens, spec.head_dim)
        halves = [f"{layer}.{half}" for layer in range(spec.num_layers) for half in ("key", "value")]
        try:
            # Zeros, not empty: what is hidden still takes part in the arithmetic, and must be a number.
            self._past: dict[str, NDArray[np.float32]] = {half: np.zeros(shape, np.float32) for half in halves}
        except MemoryError as error:
            raise PermanentError(
                "worker.out_of_memory", f"no memory for a cache of {session.past_tokens} tokens"
            ) from error
        self._feeds = {f"past_key_values.{half}": buffer for half, buffer in self._past.items()}
        self._outputs = ["logits", *(f"present.{half}" for half in halves)]

    def rewind(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if not 0 <= length <= self.length:
            raise PermanentError("worker.context", f"cannot rewind from {self.length} to {length} tokens")
        self.length = length

    def forward(self, tokens: Sequence[int]) -> Logits:
        """Append ``tokens`` in as few passes as the windows allow.

        Args:
            tokens: ids of the next positions, at least one.

        Returns:
            Logits after the last of them, float32 (rows,).

        Raises:
            PermanentError: ``worker.context`` when they do not fit, ``worker.bad_logits``, ``worker.out_of_memory``,
                ``worker.deadline``, ``worker.inference``.
        """
        total = self.length + len(tokens)
        if not self.length < total <= self.capacity_tokens:
            raise PermanentError("worker.context", f"{total} tokens do not fit in {self.capacity_tokens}")
        logits: Logits | None = None
        left = list(tokens)
        while left:
            window = self._window(len(left))
            logits = self._pass(window, left[: window.tokens])
            left = left[window.tokens :]
        if logits is None:  # cannot happen: there was at least one token
            raise PermanentError("worker.inference", "no pass was run")
        return logits

    def append(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` where nobody needs their scores; a static graph has its head inside, so nothing is saved.

        Args:
            tokens: ids of the next positions, at least one.

        Raises:
            PermanentError: as `forward`.
        """
        self.forward(tokens)

    def feeds(self, window_tokens: int, tokens: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Every input of a pass.

        Args:
            window_tokens: T, positions of the graph.
            tokens: ids of at most T next positions.

        Returns:
            By input name: ``input_ids`` and ``position_ids`` int32 (1, T), ``attention_bias`` float32
            (1, 1, T, past + T), the past float32 (1, kv_heads, past, head_dim), not copied.
        """
        count, past = len(tokens), self._session.past_tokens
        ids = np.full((1, window_tokens), PADDING_ID, np.int32)
        ids[0, :count] = tokens
        positions = np.zeros((1, window_tokens), np.int32)
        positions[0, :count] = range(self.length, self.length + count)
        bias = np.full((1, 1, window_tokens, past + window_tokens), MASKED_BIAS, np.float32)
        bias[..., : self.length] = 0.0
        bias[0, 0, :, past:][np.tril_indices(window_tokens)] = 0.0
        return {"input_ids": ids, "position_ids": positions, "attention_bias": bias, **self._feeds}

    def _window(self, count: int) -> Window:
        """The narrowest graph that takes ``count`` tokens at once, else the widest."""
        windows = self._session.windows
        return next((window for window in windows if window.tokens >= count), windows[-1])

    def _pass(self, window: Window, tokens: Sequence[int]) -> Logits:
        try:
            feeds = self.feeds(window.tokens, tokens)
            logits, *present = window.session.run(self._outputs, feeds, self._session.limit.run_options)
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise map_library_error("running the model", error) from error
        start, count = self.length, len(tokens)
        last: Logits = logits[0, count - 1]
        # Hidden positions take part in the arithmetic: one that is no number would spoil every later event.
        if not np.isfinite(last).all():
            raise PermanentError("worker.bad_logits", "the model's scores are not finite numbers")
        for buffer, new in zip(self._past.values(), present, strict=True):
            buffer[:, :, start : start + count] = new[:, :, :count]  # (1, kv_heads, count, head_dim)
        self.length += count
        return last


def _load(graph: Path, target: Target, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would heat a fanless gateway between events.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(graph), **use_provider(target, options))
    except EdgeError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise map_library_error("loading the model", error) from error


def _check_interface(window: Window, spec: ModelSpec, past_tokens: int, rows: int) -> None:
    kv = [1, spec.num_kv_heads, past_tokens, spec.head_dim]
    new = [1, spec.num_kv_heads, window.tokens, spec.head_dim]
    halves = [f"{layer}.{half}" for layer in range(spec.num_layers) for half in ("key", "value")]
    wanted = {
        "input_ids": [1, window.tokens],
        "position_ids": [1, window.tokens],
        "attention_bias": [1, 1, window.tokens, past_tokens + window.tokens],
        **{f"past_key_values.{half}": kv for half in halves},
        **{f"present.{half}": new for half in halves},
    }
    found = {
        tensor.name: list(tensor.shape) for tensor in [*window.session.get_inputs(), *window.session.get_outputs()]
    }
    logits = found.pop("logits", [])
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if logits != [1, window.tokens, rows]:
        odd.append("logits")
    if odd:
        raise PermanentError(
            "bundle.unsupported",
            f"graph of {window.tokens} tokens does not have graph interface 2: {', '.join(odd[:4])}",
        )
