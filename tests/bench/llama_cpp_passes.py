"""llama.cpp in a fresh process, measured as `tests.bench.decode_passes` measures the others.

    build/bench/llama-cpp-…/bin/python tests/bench/llama_cpp_passes.py MODEL.gguf --depths 64 256 --steps 48 --threads 2

Runs in an environment of its own that holds llama-cpp-python and numpy: nothing of this repository is imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import llama_cpp
import numpy as np

_KIB = 1024


def measure(model: str, depths: list[int], steps: int, threads: int) -> dict[str, dict[str, object]]:
    """Times of prefill and of one-token passes: depth -> ``prefill_ms`` and ``step_ms``, a list."""
    engine = llama_cpp.Llama(
        model_path=model,
        n_ctx=max(depths) + steps,
        n_batch=max(depths),
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    rows = engine.n_vocab()

    def append(tokens: list[int]) -> int:
        engine.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(engine.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(rows,)).argmax())

    def after(depth: int, count: int) -> tuple[float, list[float]]:
        engine.reset()
        prefill_ms = _timed_ms(lambda: append(list(range(1, depth + 1))))
        return prefill_ms, [_timed_ms(lambda: append([2])) for _ in range(count)]

    found: dict[str, dict[str, object]] = {}
    after(depths[0], 2)  # the first pass of each kind allocates
    for depth in depths:
        prefill_ms, step_ms = after(depth, steps)
        found[str(depth)] = {"prefill_ms": prefill_ms, "step_ms": step_ms}
    return found


def _timed_ms(call: Callable[[], int]) -> float:
    started_s = time.perf_counter()
    call()
    return (time.perf_counter() - started_s) * 1000


def main() -> int:
    """Command line (see the module's docstring); prints the times as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--depths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    depths = measure(arguments.model, arguments.depths, arguments.steps, arguments.threads)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    print(json.dumps({"depths": depths, "peak_rss_bytes": peak_rss_bytes, "version": llama_cpp.__version__}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
