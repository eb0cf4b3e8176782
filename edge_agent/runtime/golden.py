"""Golden examples: what every acceptable model must answer, run on the very machine that would use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_agent.errors import EdgeError
from edge_agent.runtime.answer import GoldenMiss, GoldenOutcome, percentile
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.memory import peak_rss_bytes


def run_golden(engine: Engine, progress: Callable[[int, int], None] | None = None) -> GoldenOutcome:
    """Answer all golden examples of all tasks, each within its task's deadline.

    Args:
        engine: the loaded bundle.
        progress: called after each example with (done, total).

    Returns:
        How many were tried, which failed (wrong answer or error), and what it took.
    """
    jobs = [(task, index, example) for task in engine.tasks for index, example in enumerate(engine.golden(task))]
    wrong: list[GoldenMiss] = []
    latencies_ms: list[float] = []
    for done, (task, index, example) in enumerate(jobs, start=1):
        expected: dict[str, Any] = dict(example.decision)
        deadline_s = engine.tasks[task].deadline_ms / 1000
        try:
            answer = engine.decide(task, dict(example.event), deadline_s=deadline_s)
        except EdgeError as error:
            wrong.append(GoldenMiss(task, index, expected, None, error.code))
        else:
            latencies_ms.append(answer.latency_ms)
            if answer.decision != expected:
                wrong.append(GoldenMiss(task, index, expected, answer.decision))
        if progress is not None:
            progress(done, len(jobs))
    return GoldenOutcome(len(jobs), tuple(wrong), percentile(latencies_ms, 0.95), peak_rss_bytes())
