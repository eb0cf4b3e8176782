"""Our side: a bundle in the device's own engine, in a fresh process.

    python -m tests.bench.engine_decisions BUNDLE JOB.json --digest SHA256 [--prefix-dir DIR] [--dictated]

It starts as the device's worker does: every file is hashed against the digest that was verified when the bundle was
installed, while the interpreter imports the libraries. Dictated, it answers as the job says (`tests.bench.dictated`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

# Before onnxruntime is imported: its official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError
from edge_agent.runtime.memory import peak_rss_bytes
from edge_agent.runtime.speed import Speed
from edge_agent.runtime.worker import load_engine

if TYPE_CHECKING:  # the worker's start is measured, and it imports these itself
    from edge_agent.runtime.answer import Answer

DEADLINE_S = 60.0
"""Far beyond any answer: what is measured is how long it takes, not whether it is late."""
MEMORY_BYTES = 8 << 20
_REPEATS = 20


class Decides(Protocol):
    """What is measured: the engine, or one that is told what to answer."""

    def decide(self, task: str, event: Event, *, deadline_s: float) -> Answer:
        """As `Engine.decide`."""

    def decide_many(self, task: str, events: Sequence[Event], *, deadline_s: float) -> list[Answer | EdgeError]:
        """As `Engine.decide_many`."""

    def encode_prefix(self, task: str) -> list[int]:
        """As `Engine.encode_prefix`."""

    def encode_event(self, task: str, event: Event) -> list[int]:
        """As `Engine.encode_event`."""


def answer_backlog(engine: Decides, task: str, events: Sequence[Event]) -> list[Answer]:
    """Answer events that are all waiting: the one place that knows how the engine does that best.

    Raises:
        EdgeError: the first fault of any event.
    """
    answers: list[Answer] = []
    for found in engine.decide_many(task, events, deadline_s=DEADLINE_S):
        if isinstance(found, EdgeError):
            raise found
        answers.append(found)
    return answers


def repeated_per_s(engine: Decides, task: str, events: Sequence[Event]) -> float:
    """Decisions per second, one at a time, on events that an engine with a memory of answers has answered before."""
    for event in events:
        engine.decide(task, event, deadline_s=DEADLINE_S)
    started_s = time.monotonic()
    for event in list(events) * _REPEATS:
        engine.decide(task, event, deadline_s=DEADLINE_S)
    return len(events) * _REPEATS / (time.monotonic() - started_s)


def answer_job(load: Callable[[Speed], Decides], job: dict[str, Any], speed: Speed, spawned_s: float) -> dict[str, Any]:
    """Answer everything.

    Args:
        load: makes what is measured.
        job: as `tests.bench.decision_runs.Job` writes it.
        speed: the engine's levers; answers are remembered only where repeated events are measured.
        spawned_s: `time.monotonic` when this process was started.

    Returns:
        What `tests.bench.decision_runs.parse_run` reads.
    """
    engine = load(speed)
    task = job["task"]
    warm, measured, backlog = ([prompt["event"] for prompt in job[part]] for part in ("warm", "measured", "backlog"))
    engine.decide(task, warm[0], deadline_s=DEADLINE_S)
    first_decision_s = time.monotonic() - spawned_s
    for event in [prompt["event"] for prompt in job["history"]] + warm[1:]:
        engine.decide(task, event, deadline_s=DEADLINE_S)
    processor_before_s = time.process_time()
    answers = [engine.decide(task, event, deadline_s=DEADLINE_S) for event in measured]
    processor_s = time.process_time() - processor_before_s
    peak_bytes = peak_rss_bytes()
    started_s = time.monotonic()
    tokens = [answer.tokens_out for answer in answer_backlog(engine, task, backlog)]
    backlog_s = time.monotonic() - started_s
    remembering = load(replace(speed, decision_cache_bytes=MEMORY_BYTES))
    prefix = engine.encode_prefix(task)
    prompts = [prompt for part in ("warm", "measured", "backlog") for prompt in job[part]]
    return {
        "first_decision_s": first_decision_s,
        "peak_rss_bytes": peak_bytes,
        "processor_s": processor_s,
        "answers": [_answered(answer) for answer in answers],
        "backlog": {"seconds": backlog_s, "tokens": tokens} if tokens else None,
        "prompts_differ": sum([*prefix, *engine.encode_event(task, p["event"])] != p["ids"] for p in prompts),
        "repeats_per_s": repeated_per_s(remembering, task, measured),
    }


def _answered(answer: Answer) -> dict[str, Any]:
    return {
        "latency_ms": answer.latency_ms,
        # The engine does not time its passes one by one; a clock in the product's loop would be there for this alone.
        "prompt_ms": 0.0,
        "generate_ms": 0.0,
        "prompt_tokens": 0,
        "tokens": answer.tokens_out,
        "text": json.dumps(answer.decision, separators=(",", ":"), ensure_ascii=False),
    }


def main() -> int:
    """Command line (see the module's docstring); prints the run as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine_decisions")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("job", type=Path)
    parser.add_argument("--digest", required=True, help="of the bundle's manifest")
    parser.add_argument("--prefix-dir", type=Path, help="keep the prefixes' states there, as the device does")
    parser.add_argument("--without-drafts", action="store_true")
    parser.add_argument("--dictated", action="store_true", help="answer as the job's decisions have it")
    parser.add_argument("--spawned-at", type=float, required=True, help="time.monotonic when this process was started")
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text("utf-8"))
    speed = Speed(prefix_dir=arguments.prefix_dir, drafts=not arguments.without_drafts, large_pages=True)
    bundle, digest, threads = arguments.bundle, arguments.digest, job["threads"]

    def load(speed: Speed) -> Decides:
        if not arguments.dictated:
            return load_engine(bundle, digest, threads, speed)
        from edge_agent.runtime.bundle import open_installed_bundle
        from edge_agent.runtime.large_pages import keep_on_heap
        from tests.bench.dictated import DictatedEngine, key_of

        keep_on_heap()
        prompts = [prompt for part in ("history", "warm", "measured", "backlog") for prompt in job[part]]
        decisions = {key_of(prompt["event"]): prompt["decision"] for prompt in prompts}
        engine = DictatedEngine(open_installed_bundle(bundle, digest), threads, speed, decisions)
        gc.freeze()
        return engine

    print(json.dumps(answer_job(load, job, speed, arguments.spawned_at)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
