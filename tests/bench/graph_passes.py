"""One form of the engine's graph, measured in a process that imports nothing but the runtime: memory is a figure, too.

python -m tests.bench.graph_passes BUNDLE --events 40 --threads 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# Before onnxruntime is imported: its official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort

from edge_agent.contract.manifest import read_manifest
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.memory import peak_rss_bytes

HELDOUT = Path(__file__).parents[2] / "export" / "reference" / "data" / "heldout.jsonl"
TASK = "triage"
DEPTH, STEPS = 256, 48
OPTIONS_OF_A_CHOICE = 8
CANDIDATES = "candidate_ids"
DEADLINE_S = 60.0


class Passes:
    """One token sequence in any form of the graph, with caches in place.

    Args:
        bundle: its folder.
        threads: intra-op threads.
        skip_head: whether a head that is apart is left out.
        capacity_tokens: longest text.
    """

    def __init__(
        self, bundle: Path, threads: int, *, skip_head: bool = False, capacity_tokens: int = DEPTH + STEPS
    ) -> None:
        spec = read_manifest(bundle)[0].model
        self._decoder = _session(bundle / spec.decoder, threads)
        self._head = _session(bundle / spec.head, threads) if spec.head and not skip_head else None
        self._inputs = {value.name for value in self._decoder.get_inputs()}
        dims = (1, spec.num_kv_heads, capacity_tokens, spec.head_dim)
        self._binding = self._decoder.io_binding()
        self._caches = []
        for layer, half in itertools.product(range(spec.num_layers), ("key", "value")):
            cache = np.zeros(dims, spec.kv_dtype)
            place = ("cpu", 0, cache.dtype.type, dims, cache.ctypes.data)
            self._binding.bind_input(f"past_key_values.{layer}.{half}", *place)
            self._binding.bind_output(f"present.{layer}.{half}", *place)
            self._caches.append(cache)
        self._result = "hidden" if spec.head else "logits"
        if CANDIDATES in self._inputs:
            self._binding.bind_cpu_input(CANDIDATES, np.arange(OPTIONS_OF_A_CHOICE, dtype=np.int64))

    def run(self, past: int, count: int) -> Any:
        """One pass of ``count`` tokens behind ``past``; scores, float32 [rows], or the hidden state."""
        self._binding.bind_cpu_input("input_ids", np.arange(3, 3 + count, dtype=np.int64)[None])
        self._binding.bind_cpu_input("attention_mask", np.ones((1, past + count), np.int64))
        if "query_seqlens" in self._inputs:
            self._binding.bind_cpu_input("query_seqlens", np.array([count], np.int32))
        self._binding.bind_output(self._result)
        self._decoder.run_with_iobinding(self._binding)
        found = self._binding.get_outputs()[-1].numpy()
        return found if self._head is None else self._head.run(["logits"], {"hidden": found})[0]


def _session(graph: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")  # as the engine: while a pass lasts
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def measure(bundle: Path, events: int, threads: int, *, skip_head: bool) -> dict[str, float]:
    """Figures of one form, in this process.

    Args:
        bundle: its folder.
        events: held-out events to decide; 0 where the engine cannot run this form.
        threads: intra-op threads.
        skip_head: whether passes leave out a head that is apart.

    Returns:
        ``decode_tok_per_s`` at a past of `DEPTH`, ``prefill_tok_per_s`` of `DEPTH` tokens, ``peak_rss_bytes`` (of the
        engine where it runs); with events ``decisions_per_s`` and ``right``: the share that is right in every field.
    """
    figures: dict[str, float] = {}
    if events:
        figures |= _decisions(bundle, events, threads)
        figures["peak_rss_bytes"] = peak_rss_bytes()
    passes = Passes(bundle, threads, skip_head=skip_head)
    passes.run(0, DEPTH)
    figures["prefill_tok_per_s"] = DEPTH / median(_timed_s(lambda: passes.run(0, DEPTH)) for _ in range(3))
    figures["decode_tok_per_s"] = 1 / median(_timed_s(lambda: passes.run(DEPTH, 1)) for _ in range(STEPS))
    figures.setdefault("peak_rss_bytes", peak_rss_bytes())
    return figures


def _decisions(bundle: Path, count: int, threads: int) -> dict[str, float]:
    engine = Engine(open_installed_bundle(bundle, read_manifest(bundle)[1]), threads)
    rows = [json.loads(line) for line in HELDOUT.read_text("utf-8").splitlines()[:count]]
    engine.decide(TASK, rows[0]["event"], deadline_s=DEADLINE_S)
    started_s = time.perf_counter()
    answers = [engine.decide(TASK, row["event"], deadline_s=DEADLINE_S).decision for row in rows]
    elapsed_s = time.perf_counter() - started_s
    right = sum(answer == row["decision"] for answer, row in zip(answers, rows, strict=True))
    return {"decisions_per_s": len(rows) / elapsed_s, "right": right / len(rows)}


def _timed_s(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring); prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.graph_passes")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-head", action="store_true")
    arguments = parser.parse_args(argv)
    print(json.dumps(measure(arguments.bundle, arguments.events, arguments.threads, skip_head=arguments.skip_head)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
