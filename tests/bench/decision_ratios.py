"""Two engines on the same events: how many times as fast, as measured and at equal output. Pure: no clock, no process.

With random weights an engine that samples every token writes the same answer in more tokens than a trained model would,
because any split of the text is grammatical. It must not pay for that: what it spent on tokens beyond ours, at its own
time for a token in that very run, is taken off (and added where it wrote fewer).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from tests.bench.decision_runs import Answered, Backlog, EngineRun


def mean_latency_ms(answers: Sequence[Answered]) -> float:
    """Mean time of a decision: a thousand over it is the rate of one client that waits for each answer."""
    return mean(answer.latency_ms for answer in answers)


def token_ms(answers: Sequence[Answered]) -> float:
    """Time of one more token, fitted over all answers; 0 where the engine tells nothing.

    The first token of an answer comes with the prompt, so the time from the first to the last is divided by one less.
    """
    further = sum(answer.tokens - 1 for answer in answers)
    return sum(answer.generate_ms for answer in answers) / further if further else 0.0


def equal_output_ms(theirs: Sequence[Answered], ours: Sequence[Answered]) -> float:
    """Mean time of the peer's decision, had every answer as many tokens as ours.

    Raises:
        ValueError: they answered different numbers of events.
    """
    surplus = mean(their.tokens - our.tokens for their, our in zip(theirs, ours, strict=True))
    return mean_latency_ms(theirs) - surplus * token_ms(theirs)


def raw_ratio(theirs: EngineRun, ours: EngineRun) -> float:
    """The peer's time over ours, as measured."""
    return mean_latency_ms(theirs.answers) / mean_latency_ms(ours.answers)


def processor_ms(run: EngineRun) -> float:
    """Processor time of a decision, over all cores: what a gateway's other programs and its battery feel."""
    return 1000 * run.processor_s / len(run.answers)


def processor_ratio(theirs: EngineRun, ours: EngineRun) -> float | None:
    """The peer's processor time over ours, as measured; None where one was not asked."""
    return processor_ms(theirs) / processor_ms(ours) if theirs.processor_s and ours.processor_s else None


def corrected_ratio(theirs: EngineRun, ours: EngineRun) -> float:
    """The peer's time over ours, at equal output."""
    return equal_output_ms(theirs.answers, ours.answers) / mean_latency_ms(ours.answers)


def without_grammar_ratio(theirs: EngineRun, ours: EngineRun) -> float | None:
    """The same, had the peer's grammar cost nothing: a bound in its favour. None where it was not asked.

    A trained model mostly proposes what the grammar allows, and llama.cpp then checks one token; random weights propose
    anything, and it checks the whole vocabulary.
    """
    if theirs.plain_token_ms is None:
        return None
    before_ms = mean(answer.latency_ms - answer.generate_ms for answer in theirs.answers)
    tokens = mean(answer.tokens for answer in ours.answers)
    return (before_ms + (tokens - 1) * theirs.plain_token_ms) / mean_latency_ms(ours.answers)


def backlog_ms(run: EngineRun, *, equal_to: EngineRun | None = None) -> float:
    """Mean time of a decision when all events are waiting.

    Args:
        run: without a backlog of its own, the time of one at a time counts.
        equal_to: whose output it should equal; None: as measured.
    """
    if run.backlog is None:
        return mean_latency_ms(run.answers) if equal_to is None else equal_output_ms(run.answers, equal_to.answers)
    if equal_to is None or equal_to.backlog is None:
        return run.backlog.ms_each
    return run.backlog.ms_each - _surplus(run.backlog, equal_to.backlog) * run.backlog.token_ms


def _surplus(theirs: Backlog, ours: Backlog) -> float:
    return mean(their - our for their, our in zip(theirs.tokens, ours.tokens, strict=True))
