"""What a tokenizer costs at every start: read by its library, and mapped as a table.

    python -m tests.bench.token_tables                              # both published vocabularies' sizes
    python -m tests.bench.token_tables --shape qwen2.5-0.5b --rounds 9

Each reading is a process of its own, in turns: how long loading takes, what it adds to the resident memory, and what an
event costs the first time and again. The events are the held-out ones, rendered by the reference task; both must say
the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edge_agent.fs import sha256_file
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.memory import return_freed_memory, rss_bytes
from export.checkpoint.source import TOKENIZER_NAME
from export.checkpoint.token_table import token_table
from tests.bench.decision_task import load_decision_task
from tests.bench.made import HELDOUT, REFERENCE, synthetic_checkpoint

SHAPES = ("smollm2-135m", "qwen2.5-0.5b")
_EVENTS = 2000
_LARGEST_VOCABULARY = 1 << 20


def read_once(tokenizer: Path, table: Path | None) -> dict[str, float | str]:
    """One reading, in a process that has loaded nothing yet."""
    task = load_decision_task(REFERENCE / "task")
    lines = HELDOUT.read_text("utf-8").splitlines()[:_EVENTS]
    texts = [task.render(json.loads(line)["event"]) for line in lines]
    before_bytes, started_s = rss_bytes() or 0, time.perf_counter()
    encoder = TextEncoder(tokenizer, _LARGEST_VOCABULARY, table)
    loaded_s = time.perf_counter()
    return_freed_memory()  # as the worker does
    grown_bytes = (rss_bytes() or 0) - before_bytes
    tokens, times_us = [], []
    for _ in range(2):
        begun_s = time.perf_counter()
        tokens = [encoder.encode(text) for text in texts]
        times_us.append((time.perf_counter() - begun_s) / len(texts) * 1e6)
    return {
        "load, ms": (loaded_s - started_s) * 1e3,
        "memory, MB": grown_bytes / (1 << 20),
        "an event, us": times_us[0],
        "an event again, us": times_us[1],
        "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
    }


def main() -> int:
    """Command line (see the module's docstring); 1 where library and table disagree."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.token_tables")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--read", type=Path, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_once(*arguments.read, *[None] * (2 - len(arguments.read)))))
        return 0
    agree = True
    for shape in arguments.shape or SHAPES:
        tokenizer = synthetic_checkpoint(shape) / TOKENIZER_NAME
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "tokens.safetensors"
            table.write_bytes(token_table(tokenizer, sha256_file(tokenizer)))
            agree = _compare(shape, tokenizer, table, arguments.rounds) and agree
    return 0 if agree else 1


def _compare(shape: str, tokenizer: Path, table: Path, rounds: int) -> bool:
    ways = {"library": [tokenizer], "table": [tokenizer, table]}
    found: dict[str, list[dict[str, float | str]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, files in ways.items():
            command = [sys.executable, "-m", "tests.bench.token_tables", "--read", *map(str, files)]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"{shape}: {tokenizer.stat().st_size:,} bytes as JSON, {table.stat().st_size:,} as a table")
    for name in [name for name in found["library"][0] if name != "tokens"]:
        medians = [statistics.median(float(one[name]) for one in found[way]) for way in ways]
        print(f"  {name:20} library {medians[0]:8.1f}   table {medians[1]:8.1f}")
    agree = len({one["tokens"] for runs in found.values() for one in runs}) == 1
    print(f"  {_EVENTS} events: {'the same tokens' if agree else 'OTHER TOKENS'}")
    return agree


if __name__ == "__main__":
    raise SystemExit(main())
