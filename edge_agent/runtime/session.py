"""The model in ONNX Runtime: a decoder, perhaps its head apart, loaded and checked. Its caches are in `kv_cache`."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Attention as two plain products: on CPUs the kernel by tiles takes a tenth longer for an event, a fifth for a prefix.
# What the tiles would save in memory is bounded by `kv_cache.MAX_PASS_TOKENS`.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")

import onnxruntime as ort

from edge_agent.contract.manifest import Manifest, ModelSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.adapter import Arrays, adapter_feeds
from edge_agent.runtime.buffers import on_device
from edge_agent.runtime.head_rows import read_head_rows
from edge_agent.runtime.kv_cache import Adapter, KvCache, LoadedGraphs
from edge_agent.runtime.library_errors import mapped
from edge_agent.runtime.pass_limit import PassLimit
from edge_agent.runtime.providers import CACHE_DEVICES, DYNAMIC, PROVIDERS, check_loaded, use_provider

MAX_DEFAULT_THREADS = 4
ARENA_BYTES = 32 * 1024 * 1024
"""Addresses of the arena's first stretch: of 32 MB a 0.5B model fills 6 with an event of 100 tokens."""


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
        self.limit = PassLimit()
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
        _use_one_arena(options)
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
        self._graphs = LoadedGraphs(self._decoder, self._head, self.spec, self.limit, self._rows)
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
        return {name: on_device(matrix, device) for name, matrix in feeds.items()}

    def new_cache(self, capacity_tokens: int, rows: int = 1, adapter: Adapter | None = None) -> KvCache:
        """Allocate a cache of texts of one task.

        Args:
            capacity_tokens: most positions of a text.
            rows: texts.
            adapter: of `load_adapter`; None: the shared weights as they are.

        Raises:
            PermanentError: ``worker.out_of_memory``.
        """
        return KvCache(self._graphs, capacity_tokens, rows, self._no_adapter if adapter is None else adapter)


def _use_one_arena(options: Any) -> None:
    """Have the values of a pass come and go in one stretch of addresses, of which only what they fill is memory.

    By itself ONNX Runtime plans which value inherits the buffer of which, and so holds the widest ones from the first
    layer to the last; and its arena grows in stretches between which free space does not add up.
    """
    options.enable_mem_reuse = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    _register_arena()


@functools.cache
def _register_arena() -> None:
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    size = ort.OrtArenaCfg({"initial_chunk_size_bytes": ARENA_BYTES})
    mapped("registering the arena", lambda: ort.create_and_register_allocator(where, size))


def _load(path: Path, wanted: dict[str, Any]) -> Any:
    return mapped("loading the model", lambda: ort.InferenceSession(str(path), **wanted))


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
    optional = {"query_seqlens": spec.ragged, "score_at": spec.score_at}
    asked = {name for name, wanted in optional.items() if wanted}
    asked |= {"position_ids", "attention_bias"} if spec.alternatives else set()
    asked |= {f"{name}.{side}" for name in spec.adapter_inputs or () for side in "AB"}
    expected_inputs = {"input_ids", "attention_mask", *asked, *(f"past_key_values.{h}" for h in halves)}
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
