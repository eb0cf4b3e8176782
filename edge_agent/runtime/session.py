"""The model in ONNX Runtime: a decoder, perhaps its head apart, and KV caches that are written in place.

A cache is allocated once at its full capacity. The same buffer is bound as ``past`` input and ``present`` output, and
the attention mask's length alone says how much of it counts. So rolling back is setting a smaller length, and a
cached prompt prefix is a length to return to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edge_agent.contract.manifest import Manifest, ModelSpec
from edge_agent.errors import EdgeError, IntegrityError, PermanentError
from edge_agent.runtime.adapter import Arrays, adapter_feeds
from edge_agent.runtime.head_rows import read_head_rows
from edge_agent.runtime.providers import CACHE_DEVICES, DYNAMIC, PROVIDERS, check_loaded, use_provider

MAX_DEFAULT_THREADS = 4
_KV_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
_LIBRARY_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in (
        "EPFail",
        "EngineError",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "ModelLoaded",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)
_MEMORY_WORDS = ("bad_alloc", "bad allocation", "failed to allocate", "out of memory", "cannot allocate memory")
_CORRUPT_WORDS = (
    "protobuf parsing failed",
    "external data",
    "external initializer",
    "out of bounds",
    "can not be read",
)

Logits = NDArray[np.float32]
Adapter = Mapping[str, Any]
"""Every adapter input of a graph as an OrtValue: made once a task, bound by each of its caches."""


def resolve_threads(threads: int) -> int:
    """Number of intra-op threads; 0 means half of the usable cores, at least one, at most four.

    Decoding a small model is bound by memory: on small boards two threads beat four.
    """
    if threads > 0:
        return threads
    return max(1, min(MAX_DEFAULT_THREADS, len(os.sched_getaffinity(0)) // 2))


class ModelSession:
    """A loaded decoder graph and its head (graph interface 1 of `ModelSpec`).

    Args:
        bundle: the verified bundle's directory.
        manifest: which file to load, and the shape that it must have.
        threads: intra-op threads, at least 1.

    Raises:
        IntegrityError: ``bundle.file_missing`` or ``bundle.file_corrupt``.
        PermanentError: ``bundle.unsupported`` (operator, opset, provider or shape), ``worker.out_of_memory``.
    """

    def __init__(self, bundle: Path, manifest: Manifest, threads: int) -> None:
        self.spec: ModelSpec = manifest.model
        check_runtime(manifest)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A pass is hundreds of short kernels: threads that sleep between them cost a quarter of the speed. They stop
        # spinning with the pass: between events they would heat a fanless gateway.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Memory patterns are kept per input shape, and every event has another length.
        options.enable_mem_pattern = False
        if PROVIDERS[manifest.target] not in DYNAMIC:
            raise PermanentError("bundle.unsupported", f"target {manifest.target} takes graph interface 2 only")
        wanted = use_provider(manifest.target, options)
        self._decoder = _load(bundle / self.spec.decoder, wanted)
        self._head = _load(bundle / self.spec.head, wanted) if self.spec.head else None
        self.providers: tuple[str, ...] = tuple(self._decoder.get_providers())
        check_loaded(manifest.target, self.providers)
        head_ids = bundle / self.spec.head_ids if self.spec.head_ids else None
        self._rows = len(read_head_rows(self.spec.vocab_size, head_ids))
        _check_interface(self._decoder, self._head, self.spec, self._rows)
        self._no_adapter = self.load_adapter({})

    def load_adapter(self, arrays: Arrays) -> Adapter:
        """A task's matrices where the graph reads them.

        Args:
            arrays: of `edge_agent.runtime.adapter.task_adapter`; what is missing has rank 0.

        Raises:
            PermanentError: ``adapter.invalid``, ``worker.out_of_memory``.
        """
        shapes = {value.name: value.shape for value in self._decoder.get_inputs()}
        device = CACHE_DEVICES.get(self.providers[0], "cpu")
        feeds = adapter_feeds(self.spec.adapter_inputs or (), shapes, arrays)
        return {name: _on_device(matrix, device) for name, matrix in feeds.items()}

    def new_cache(self, capacity_tokens: int, adapter: Adapter | None = None) -> KvCache:
        """Allocate a cache for at most ``capacity_tokens`` positions.

        Args:
            capacity_tokens: most positions.
            adapter: of `load_adapter`; None: the shared weights as they are.

        Raises:
            PermanentError: ``worker.out_of_memory``.
        """
        head = _Head(self._head, self._rows) if self._head else None
        bound = self._no_adapter if adapter is None else adapter
        return KvCache(self._decoder, self.spec, capacity_tokens, self._rows, head, bound)


class _Head:
    """The output head as a graph of its own, with the buffers between it and the decoder.

    Args:
        session: maps ``hidden`` to ``logits``.
        rows: tokens that it scores.
    """

    def __init__(self, session: Any, rows: int) -> None:
        self._session = session
        size = session.get_inputs()[0].shape[2]
        self.hidden: Logits = np.zeros((1, 1, size), np.float32)  # (1, 1, hidden): the decoder writes here
        self.logits: Logits = np.zeros((1, 1, rows), np.float32)
        self._binding: Any = session.io_binding()
        _bind(self._binding, "input", "hidden", self.hidden, self.hidden.shape)
        _bind(self._binding, "output", "logits", self.logits, self.logits.shape)

    def score(self) -> None:
        """Compute ``logits`` of ``hidden``."""
        _mapped("running the model", lambda: self._session.run_with_iobinding(self._binding))


class KvCache:
    """Keys and values of one token sequence, and the buffers of its passes.

    Args:
        session: the loaded decoder.
        spec: its shape.
        capacity_tokens: most positions it can hold.
        rows: tokens that the head scores.
        head: the head, where it is apart.
        adapter: bound for good: a cache holds keys and values of one task's weights.
    """

    def __init__(
        self, session: Any, spec: ModelSpec, capacity_tokens: int, rows: int, head: _Head | None, adapter: Adapter
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self._session = session
        self._head = head
        dtype = _KV_DTYPES[spec.kv_dtype]
        shape = (1, spec.num_kv_heads, capacity_tokens, spec.head_dim)
        try:
            # Zeros, not empty: pages are touched now, so that memory which is missing is missed at load.
            device = CACHE_DEVICES.get(session.get_providers()[0], "cpu")
            self._buffers = [_on_device(np.zeros(shape, dtype), device) for _ in range(2 * spec.num_layers)]
            self._ids = np.zeros((1, capacity_tokens), np.int64)
            self._mask = np.ones((1, capacity_tokens), np.int64)
            self._counts = np.zeros(1, np.int32) if spec.ragged else None  # (1,): real tokens of the only row
            self._logits: Logits = np.zeros((1, 1, rows), np.float32) if head is None else head.logits
        except MemoryError as error:
            raise PermanentError(
                "worker.out_of_memory", f"no memory for a cache of {capacity_tokens} tokens"
            ) from error
        self._binding: Any = session.io_binding()
        names = [f"{layer}.{half}" for layer in range(spec.num_layers) for half in ("key", "value")]
        for name, buffer in zip(names, self._buffers, strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            self._binding.bind_ortvalue_output(f"present.{name}", buffer)
        self._adapter = adapter  # the binding does not keep them alive
        for name, matrix in adapter.items():
            self._binding.bind_ortvalue_input(name, matrix)
        if self._counts is not None:
            _bind(self._binding, "input", "query_seqlens", self._counts, (1,))
        if head is None:
            _bind(self._binding, "output", "logits", self._logits, self._logits.shape)
        else:
            _bind(self._binding, "output", "hidden", head.hidden, head.hidden.shape)

    def rewind(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if not 0 <= length <= self.length:
            raise PermanentError("worker.context", f"cannot rewind from {self.length} to {length} tokens")
        self.length = length

    def forward(self, tokens: Sequence[int]) -> Logits:
        """Append ``tokens`` in one pass.

        Args:
            tokens: ids of the next positions, at least one.

        Returns:
            Logits after the last of them, float32 (rows,): a view that the next pass overwrites.

        Raises:
            PermanentError: ``worker.context`` when they do not fit, ``worker.out_of_memory``, ``worker.inference``.
        """
        self.append(tokens)
        if self._head is not None:
            self._head.score()
        logits: Logits = self._logits[0, 0]
        return logits

    def append(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` in one pass whose scores nobody needs: where the head is apart, it is not run.

        Args:
            tokens: ids of the next positions, at least one.

        Raises:
            PermanentError: as `forward`.
        """
        count = len(tokens)
        total = self.length + count
        if not 0 < count <= self.capacity_tokens - self.length:
            raise PermanentError("worker.context", f"{total} tokens do not fit in {self.capacity_tokens}")
        self._ids[0, :count] = tokens
        # Only these two change their shape from pass to pass: (1, count) and (1, past + count).
        _bind(self._binding, "input", "input_ids", self._ids, (1, count))
        _bind(self._binding, "input", "attention_mask", self._mask, (1, total))
        if self._counts is not None:
            self._counts[0] = count
        _mapped("running the model", lambda: self._session.run_with_iobinding(self._binding))
        self.length = total


def _bind(
    binding: Any, side: Literal["input", "output"], name: str, buffer: NDArray[Any], shape: tuple[int, ...]
) -> None:
    bind = binding.bind_input if side == "input" else binding.bind_output
    bind(name, "cpu", 0, buffer.dtype.type, shape, buffer.ctypes.data)


def _on_device(zeros: NDArray[Any], device: str) -> Any:
    # A graph reads its inputs where it runs. What is bound from elsewhere is copied there once, when it is bound: a
    # cache on the wrong side would stay as empty as it began.
    return _mapped("allocating a cache", lambda: ort.OrtValue.ortvalue_from_numpy(zeros, device, 0))


def _load(path: Path, wanted: dict[str, Any]) -> Any:
    return _mapped("loading the model", lambda: ort.InferenceSession(str(path), **wanted))


def _mapped(doing: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (*_LIBRARY_ERRORS, RuntimeError, MemoryError) as error:  # bound runs raise Python's own RuntimeError
        raise map_library_error(doing, error) from error


def map_library_error(doing: str, error: BaseException) -> EdgeError:
    """An ONNX Runtime error (or `MemoryError`) as one of ours.

    Args:
        doing: what was being done; "loading the model" distinguishes a bad bundle from a failed run.
        error: what the library raised.

    Returns:
        ``worker.out_of_memory``, ``bundle.file_missing``, ``bundle.file_corrupt``, ``bundle.unsupported``, or
        ``worker.inference`` for a run.
    """
    text = str(error)
    lowered = text.lower()
    if isinstance(error, MemoryError) or any(word in lowered for word in _MEMORY_WORDS):
        return PermanentError("worker.out_of_memory", f"{doing}: {text or 'allocation failed'}")
    if doing != "loading the model":
        return PermanentError("worker.inference", f"{doing}: {text}")
    if isinstance(error, ort_errors.NoSuchFile):
        return IntegrityError("bundle.file_missing", f"{doing}: {text}")
    if isinstance(error, ort_errors.InvalidProtobuf) or any(word in lowered for word in _CORRUPT_WORDS):
        return IntegrityError("bundle.file_corrupt", f"{doing}: {text}")
    return PermanentError("bundle.unsupported", f"{doing}: {text}")


def check_runtime(manifest: Manifest) -> None:
    """Refuse a bundle that asks for a newer ONNX Runtime.

    Raises:
        PermanentError: ``bundle.unsupported``.
    """
    needed = manifest.minimum_runtime.get("onnxruntime")
    if needed is not None and _version(ort.__version__) < _version(needed):
        raise PermanentError("bundle.unsupported", f"needs onnxruntime {needed}, this is {ort.__version__}")


def _version(text: str) -> tuple[int, ...]:
    parts = text.split("+", maxsplit=1)[0].split(".")[:3]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def _check_interface(decoder: Any, head: Any, spec: ModelSpec, rows: int) -> None:
    halves = [f"{layer}.{half}" for layer in range(spec.num_layers) for half in ("key", "value")]
    result = "logits" if head is None else "hidden"
    ragged = {"query_seqlens"} if spec.ragged else set()
    adapters = {f"{name}.{side}" for name in spec.adapter_inputs or () for side in "AB"}
    expected_inputs = {"input_ids", "attention_mask", *ragged, *adapters, *(f"past_key_values.{h}" for h in halves)}
    _check_names(decoder, expected_inputs, {result, *(f"present.{h}" for h in halves)})
    _check_axes(decoder, {f"past_key_values.{h}": {1: spec.num_kv_heads, 3: spec.head_dim} for h in halves})
    wanted = {"logits": {1: 1, 2: rows}}
    if head is None:
        _check_axes(decoder, wanted)
        return
    _check_names(head, {"hidden"}, {"logits"})
    _check_axes(head, wanted)
    size = head.get_inputs()[0].shape[-1]
    if not isinstance(size, int):
        raise PermanentError("bundle.unsupported", "the head does not say how wide its input is")
    _check_axes(decoder, {"hidden": {1: 1, 2: size}})


def _check_names(session: Any, expected_inputs: set[str], expected_outputs: set[str]) -> None:
    inputs, outputs = ({value.name for value in values} for values in (session.get_inputs(), session.get_outputs()))
    if inputs != expected_inputs or not expected_outputs <= outputs:
        odd = sorted((inputs ^ expected_inputs) | (expected_outputs - outputs))
        raise PermanentError("bundle.unsupported", f"graph does not have graph interface 1: {', '.join(odd[:4])}")


def _check_axes(session: Any, wanted: dict[str, dict[int, int]]) -> None:
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    for name, axes in wanted.items():
        for axis, size in axes.items():
            found = shapes[name][axis] if len(shapes[name]) > axis else None
            # A symbolic dimension is a name (or None) and may still turn out right.
            if isinstance(found, int) and found != size:
                raise PermanentError("bundle.unsupported", f"{name} has {found} on axis {axis}, manifest says {size}")
