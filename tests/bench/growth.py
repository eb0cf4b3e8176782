"""Whether a long life makes the engine slower or larger: N decisions in one process.

    python -m tests.bench.growth                       # 100,000 decisions of the reference bundle
    python -m tests.bench.growth --decisions 20000 --bundle DIR --events FILE.jsonl

Prints the median cost of an event among the first and the last 1,000 after warm-up, in processor time (what else the
machine does is not ours), and the resident memory at both ends. Exits 1 where memory drifted by 2 % or more, or an
event costs a quarter more than in the beginning. Every hundredth event fails on purpose (its deadline has passed),
because errors leak too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import sys
import time
from array import array
from pathlib import Path
from statistics import median

from edge_agent.contract.event import Event, check_event
from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import PermanentError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.memory import rss_bytes

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 2000
SAMPLE = 1000
DRIFT_MAX = 0.02
# Far above the noise of a machine that does other work, far below what a list that grows would cost.
COST_RATIO_MAX = 1.25
REPORT_EVERY = 10_000
FAIL_EVERY = 100


def main() -> int:
    """Run, print, judge; the exit status."""
    options = _parse()
    bundle = options.bundle.resolve()
    engine = Engine(open_installed_bundle(bundle, read_manifest(bundle)[1]), options.threads)
    task = next(iter(engine.tasks))
    events = itertools.cycle(_events(options.events))
    for _ in range(WARM_UP):
        _one(engine, task, next(events), 60.0)
    gc.collect()
    # Stands for what the measuring itself will keep, so that it is not counted as growth.
    taken_ms = array("d", bytes(8 * options.decisions))
    start = rss_bytes() or 1
    for number in range(options.decisions):
        deadline_s = 0.0 if number % FAIL_EVERY == FAIL_EVERY - 1 else 60.0
        taken_ms[number] = _one(engine, task, next(events), deadline_s)
        if number % REPORT_EVERY == REPORT_EVERY - 1:
            print(f"{number + 1} decisions, {(rss_bytes() or 0) / 2**20:.1f} MiB", file=sys.stderr)
    gc.collect()
    end = rss_bytes() or 0
    first_ms, last_ms = median(taken_ms[:SAMPLE]), median(taken_ms[-SAMPLE:])
    drift, ratio = (end - start) / start, last_ms / first_ms
    print(f"event: {first_ms:.2f} ms among the first {SAMPLE}, {last_ms:.2f} ms among the last: {ratio:.2f} x")
    print(f"memory: {start / 2**20:.1f} MiB after warm-up, {end / 2**20:.1f} MiB at the end: {drift:+.2%}")
    is_sound = drift < DRIFT_MAX and ratio < COST_RATIO_MAX
    print("ok" if is_sound else f"exceeded: {DRIFT_MAX:.0%} of memory or {COST_RATIO_MAX} x of time are allowed")
    return 0 if is_sound else 1


def _one(engine: Engine, task: str, event: Event, deadline_s: float) -> float:
    started_s = time.process_time()
    with contextlib.suppress(PermanentError):
        engine.decide(task, event, deadline_s=deadline_s)
    return (time.process_time() - started_s) * 1000


def _events(path: Path) -> list[Event]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [check_event(row.get("event", row)) for row in rows]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "export/reference/bundle")
    parser.add_argument("--events", type=Path, default=ROOT / "export/reference/data/heldout.jsonl")
    parser.add_argument("--decisions", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1, help="more than one spin, which costs processor time")
    options = parser.parse_args()
    if options.decisions < 2 * SAMPLE:
        parser.error(f"--decisions must be at least {2 * SAMPLE}")
    return options


if __name__ == "__main__":
    sys.exit(main())
