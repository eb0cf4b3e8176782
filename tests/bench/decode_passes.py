"""One engine in a fresh process: prefill, then passes of one token behind it.

    python -m tests.bench.decode_passes fused BUNDLE --depths 64 256 --steps 48 --threads 2
    python -m tests.bench.decode_passes optimum FOLDER

Every pass appends one token to what is there, as generation does, and looks for the largest logit. The tokens
themselves are the same for every engine: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

# Before onnxruntime is imported: its official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_agent.contract.manifest import read_manifest
from edge_agent.runtime.adapter import task_adapter
from edge_agent.runtime.large_pages import gather_heap
from edge_agent.runtime.memory import peak_rss_bytes
from edge_agent.runtime.session import ModelSession

Clock = Callable[[], float]
Logits = npt.NDArray[np.float32]
OPTIMUM_GRAPH = "model.onnx"


class Engine(Protocol):
    """One token sequence in one runtime."""

    def restart(self) -> None:
        """Forget every token."""
        ...

    def append(self, tokens: Sequence[int]) -> Logits:
        """Run ``tokens`` after what is there; logits after the last of them, float32 [rows]."""
        ...


class FusedEngine:
    """A bundle in the device's own session.

    Args:
        bundle: its folder.
        capacity_tokens: the longest sequence to come.
        threads: intra-op threads.
        task: whose adapter is used, if it has one.
    """

    def __init__(self, bundle: Path, capacity_tokens: int, threads: int, task: str) -> None:
        manifest, _ = read_manifest(bundle)
        session = ModelSession(bundle, manifest, threads)
        adapter = session.load_adapter(task_adapter(bundle, manifest.model, task))
        self._cache = session.new_cache(capacity_tokens, adapter=adapter)
        gather_heap()  # as a device's worker after its first answer

    def restart(self) -> None:
        """Forget every token."""
        self._cache.rewind(0)

    def append(self, tokens: Sequence[int]) -> Logits:
        """Run ``tokens`` in place."""
        return self._cache.forward(tokens)


class OptimumEngine:
    """optimum's graph with growing caches, which stay inside ONNX Runtime from pass to pass.

    Args:
        folder: holds `OPTIMUM_GRAPH`.
        threads: intra-op threads; they spin between passes, as they do by default.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: Any = ort.InferenceSession(
            str(folder / OPTIMUM_GRAPH), options, providers=["CPUExecutionProvider"]
        )
        self._pasts = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._caches: dict[str, Any] = {}
        self._length = 0
        self.restart()

    def restart(self) -> None:
        """Start from empty caches."""
        # Shape: [batch, kv_heads, past, head_dim].
        self._caches = {
            i.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32))
            for i in self._pasts
        }
        self._length = 0

    def append(self, tokens: Sequence[int]) -> Logits:
        """Run ``tokens``; this pass's outputs are the next pass's inputs, without a copy through Python."""
        total = self._length + len(tokens)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(self._length, total, dtype=np.int64)[None])
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._caches = {name: results[name.replace("past_key_values", "present")] for name in self._caches}
        self._length = total
        logits: Logits = results["logits"].numpy()[0, -1]
        return logits


def measure(
    engine: Engine, depths: Sequence[int], steps: int, clock: Clock = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """Times of prefill and of one-token passes.

    Args:
        engine: freshly loaded.
        depths: tokens before the first measured pass.
        steps: measured passes at each depth.
        clock: seconds; of the processor where the machine has other work and one thread is measured.

    Returns:
        depth -> ``prefill_ms`` and ``step_ms``, a list.
    """
    found: dict[str, dict[str, Any]] = {}
    _continue(engine, depths[0], 2, clock)  # the first pass of each kind allocates
    for depth in depths:
        prefill_ms, step_ms = _continue(engine, depth, steps, clock)
        found[str(depth)] = {"prefill_ms": prefill_ms, "step_ms": step_ms}
    return found


def _continue(engine: Engine, depth: int, steps: int, clock: Clock) -> tuple[float, list[float]]:
    engine.restart()
    prefill_ms = _timed_ms(lambda: engine.append(range(1, depth + 1)), clock)
    return prefill_ms, [_timed_ms(lambda: int(engine.append([2]).argmax()), clock) for _ in range(steps)]


def _timed_ms(call: Callable[[], object], clock: Clock) -> float:
    started_s = clock()
    call()
    return (clock() - started_s) * 1000


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring); prints the times as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decode_passes")
    parser.add_argument("engine", choices=("fused", "optimum"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the wall")
    parser.add_argument("--task", default="", help="use this task's adapter")
    arguments = parser.parse_args(argv)
    engine: Engine
    if arguments.engine == "fused":
        engine = FusedEngine(
            arguments.model, max(arguments.depths) + arguments.steps, arguments.threads, arguments.task
        )
    else:
        engine = OptimumEngine(arguments.model, arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    depths = measure(engine, arguments.depths, arguments.steps, clock)
    print(json.dumps({"depths": depths, "peak_rss_bytes": peak_rss_bytes()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
