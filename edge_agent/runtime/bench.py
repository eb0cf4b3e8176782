"""What a bundle does on this machine: whole decisions, and the two kinds of pass that they are made of."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError, RefusedError
from edge_agent.runtime.answer import percentile
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.machine_kind import machine_kind
from edge_agent.runtime.memory import peak_rss_bytes
from edge_agent.runtime.prepared import PreparedTask

_PASS_SHARE = 0.15
_BACKLOG_SHARE = 0.3
_MIN_DECISIONS = 5
_PREFIX_PASSES = 3


def bench(engine: Engine, task: str, events: Sequence[Event], *, seconds: float = 10.0) -> dict[str, Any]:
    """Measure an engine that has decided nothing yet.

    Args:
        engine: freshly loaded, so that the first decision is the first.
        task: which of its tasks.
        events: decided in turn, over and over; what events begin with is forgotten before each turn, and no answer is
            remembered, so that no event profits from having been seen.
        seconds: how long decisions are measured; passes and a backlog take a further 60 % of it.

    Returns:
        ``decisions_per_s``, ``p50_ms``, ``p95_ms`` over whole decisions, one at a time; ``backlog_decisions_per_s``
        where all of them wait, ``together`` of which may share passes; ``passes`` and ``tokens_out`` as means per
        decision; ``prefill_tok_per_s`` of passes as long as the mean event and ``decode_tok_per_s`` of one-token
        passes behind it; the same by phase: ``prefix_prefill_ms`` (once a task), ``event_prefill_ms`` and
        ``decode_pass_ms``, with ``prefix_tokens`` and ``event_tokens``; ``load_s``, ``first_decision_s`` (load
        included), ``peak_rss_bytes``, ``threads``, ``decisions``; ``machine``, the kind of it.

    Raises:
        RefusedError: ``bench.no_events``, or what `Engine.decide` refuses.
        PermanentError: as `Engine.decide`.
    """
    if not events:
        raise RefusedError("bench.no_events", "there is no event to measure with")
    prepared = engine.prepared(task)
    deadline_s = max(prepared.task.spec.deadline_ms / 1000, seconds)
    first = engine.decide(task, events[0], deadline_s=deadline_s)
    latencies_ms: list[float] = []
    passes = tokens_out = 0
    started_s = time.monotonic()
    for number, event in enumerate(itertools.cycle(events)):
        if number % len(events) == 0:
            prepared.forget()
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= seconds and len(latencies_ms) >= _MIN_DECISIONS:
            break
        answer = engine.decide(task, event, deadline_s=deadline_s)
        latencies_ms.append(answer.latency_ms)
        passes += answer.passes
        tokens_out += answer.tokens_out
    elapsed_s = time.monotonic() - started_s
    decisions = len(latencies_ms)
    backlog = _rate(lambda: _decide_all(engine, task, events, deadline_s), seconds * _BACKLOG_SHARE)
    event_tokens = _mean_event(engine, task, events)
    prefill, decode = _pass_rates(prepared, event_tokens, seconds * _PASS_SHARE)
    load_s = engine.facts().load_s
    return {
        "decisions_per_s": decisions / elapsed_s,
        "backlog_decisions_per_s": backlog,
        "together": prepared.rows,
        "p50_ms": percentile(latencies_ms, 0.5),
        "p95_ms": percentile(latencies_ms, 0.95),
        "decode_tok_per_s": decode,
        "prefill_tok_per_s": prefill,
        "prefix_prefill_ms": _prefix_ms(engine, task),
        "event_prefill_ms": 1000 * len(event_tokens) / prefill,
        "decode_pass_ms": 1000 / decode,
        "prefix_tokens": prepared.prefix_tokens,
        "event_tokens": len(event_tokens),
        "machine": machine_kind(),
        "peak_rss_bytes": peak_rss_bytes(),
        "load_s": load_s,
        "first_decision_s": load_s + first.latency_ms / 1000,
        "tokens_out": tokens_out / decisions,
        "passes": passes / decisions,
        "threads": engine.threads,
        "decisions": decisions,
    }


def _decide_all(engine: Engine, task: str, events: Sequence[Event], deadline_s: float) -> int:
    engine.prepared(task).forget()
    for answer in engine.decide_many(task, events, deadline_s=deadline_s):
        if isinstance(answer, EdgeError):
            raise answer
    return len(events)


def _mean_event(engine: Engine, task: str, events: Sequence[Event]) -> list[int]:
    """Token ids of as many tokens as the mean event has."""
    prompts = [engine.encode_event(task, event) for event in events[:64]]
    mean_tokens = max(1, round(sum(map(len, prompts)) / len(prompts)))
    longest = max(prompts, key=len)
    return (longest * (mean_tokens // len(longest) + 1))[:mean_tokens]


def _pass_rates(prepared: PreparedTask, tokens: list[int], seconds: float) -> tuple[float, float]:
    """Tokens per second of event-sized passes, and of one-token passes at the depth of an answer."""

    def prefill() -> int:
        prepared.cache.rewind(prepared.prefix_tokens)
        prepared.cache.forward(tokens)
        return len(tokens)

    def decode() -> int:
        _step(prepared, prepared.prefix_tokens + len(tokens), tokens[-1])
        return 1

    return _rate(prefill, seconds), _rate(decode, seconds)


def _prefix_ms(engine: Engine, task: str) -> float:
    """Median time of computing the prefix anew, which leaves the cache as it was."""
    prepared, prefix = engine.prepared(task), engine.encode_prefix(task)
    taken_ms = []
    for _ in range(_PREFIX_PASSES):
        prepared.cache.rewind(0)
        started_s = time.monotonic()
        prepared.cache.forward(prefix)
        taken_ms.append((time.monotonic() - started_s) * 1000)
    return percentile(taken_ms, 0.5)


def _step(prepared: PreparedTask, depth: int, token: int) -> None:
    prepared.cache.rewind(depth)
    prepared.cache.forward([token])


def _rate(run: Callable[[], int], seconds: float) -> float:
    run()  # the first pass of a shape allocates
    count = 0
    started_s = time.monotonic()
    while (elapsed_s := time.monotonic() - started_s) < seconds or not count:
        count += run()
    return count / elapsed_s
