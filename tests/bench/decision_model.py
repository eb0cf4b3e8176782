"""Decisions per second of one model: ours beside llama.cpp's server and onnxruntime-genai, as figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edge_agent.contract.event import Event
from edge_agent.contract.task import TaskSpec
from tests.bench.answer_grammars import gbnf, regex
from tests.bench.attempts import Missing, Say, attempt
from tests.bench.cache import CACHE
from tests.bench.decision_contenders import DecisionContenders, LlamaServer, Ogenai, OurBundle
from tests.bench.decision_rows import (
    LLAMA,
    LLAMA_MAPPED,
    LLAMA_REMEMBERING,
    LLAMA_SLOTS,
    MODELS,
    OGENAI,
    OURS,
    OURS_INT4,
    OURS_PLAIN,
    backlog_figures,
    engine_figures,
    own_figures,
    plant_figures,
    ratio_figures,
    tried_figures,
)
from tests.bench.decision_runs import EngineRun, Job, Turns, run_program, take_turns
from tests.bench.decision_task import heldout_events, plant_events, prompts, trained_decisions
from tests.bench.figures import Figure
from tests.bench.llama_server_decisions import (
    SETTINGS,
    Setting,
    all_waiting,
    as_by_default,
    as_remembering,
    best_setting,
    few_events,
    one_at_a_time,
)
from tests.bench.made import HERE, python_module
from tests.bench.measured_run import CommandFailedError
from tests.bench.ogenai_peer import environment

MAX_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class DecisionSettings:
    """How thoroughly to measure.

    Args:
        rounds: fresh processes of each engine.
        warm: events of a process that are not measured.
        events: that are answered one at a time.
        backlog: that are all waiting.
        history: events that ours has answered before, as a device has; no peer learns from more than the last one.
        threads: of every engine.
        with_trials: whether llama-server's settings are tried; without, it gets the first.
    """

    rounds: int = 3
    warm: int = 4
    events: int = 24
    backlog: int = 24
    history: int = 256
    threads: int = 2
    with_trials: bool = True


def decision_figures(made: DecisionContenders, settings: DecisionSettings, say: Say) -> list[Figure]:
    """Measure one model.

    Args:
        made: its contenders.
        settings: how thoroughly.
        say: is told what happens.

    Returns:
        Its figures; what could not be measured has no value and says why.
    """
    job, plant = make_job(made, settings), make_plant_job(made, settings)
    # A history that is not answered is not even read: it would count as memory.
    fresh, fresh_plant = replace(job, history=()), replace(plant, history=())
    engines: dict[str, Callable[[], EngineRun]] = {}
    at_plant: dict[str, Callable[[], EngineRun]] = {}
    tried: dict[str, float] = {}
    if isinstance(made.ours, OurBundle):
        trained = MODELS[made.name] is None
        told = [] if trained else ["--dictated"]
        plain = ["--without-drafts"]
        engines[OURS], at_plant[OURS] = (partial(_run_ours, made.ours, which, options=told) for which in (job, plant))
        if not trained:
            engines[OURS_PLAIN] = partial(_run_ours, made.ours, fresh, options=plain)
            at_plant[OURS_PLAIN] = partial(_run_ours, made.ours, plant, options=plain)
        if isinstance(made.ours_int4, OurBundle):
            engines[OURS_INT4] = partial(_run_ours, made.ours_int4, fresh, options=plain)
        # Leaves the prefix's state on the disk, where every start but a device's first finds it.
        for bundle in (made.ours, made.ours_int4):
            if isinstance(bundle, OurBundle):
                attempt(partial(_run_ours, bundle, few_events(fresh), options=plain), say)
    if isinstance(made.llama, LlamaServer):
        peer = made.llama
        found: tuple[Setting, dict[str, float]] | Missing = (SETTINGS[0], {})
        if settings.with_trials:
            say(f"{made.name}: llama-server, which setting is fastest here")
            found = attempt(lambda: best_setting(peer, job, say), say)
        if not isinstance(found, Missing):
            best, tried = found
            engines[LLAMA] = partial(one_at_a_time, peer, job, best)
            engines[LLAMA_MAPPED] = partial(one_at_a_time, peer, few_events(job), as_by_default(best))
            engines[LLAMA_SLOTS] = partial(all_waiting, peer, job, best)
            at_plant[LLAMA] = partial(one_at_a_time, peer, plant, best)
            at_plant[LLAMA_REMEMBERING] = partial(one_at_a_time, peer, plant, as_remembering(best))
    if isinstance(made.ogenai, Ogenai):
        engines[OGENAI] = partial(_run_ogenai, made.ogenai, fresh)
        at_plant[OGENAI] = partial(_run_ogenai, made.ogenai, fresh_plant)

    def turns_of(what: str, contenders: dict[str, Callable[[], EngineRun]]) -> Turns:
        say(f"{made.name}: {what}, {settings.rounds} rounds")
        found = take_turns(contenders, settings.rounds, partial(check_answers, made.task))
        for engine, why in found.failed.items():
            say(f"not compared: {engine}: {why}")
        return found

    turns, plant_turns = turns_of("decisions", engines), turns_of("a plant's events", at_plant)
    return [
        *ratio_figures(made.name, turns),
        *plant_figures(made.name, plant_turns),
        *backlog_figures(made.name, turns.runs),
        *own_figures(made.name, turns.runs),
        *engine_figures(made.name, turns.runs),
        *tried_figures(made.name, tried),
    ]


def make_job(made: DecisionContenders, settings: DecisionSettings) -> Job:
    """The same events for every engine, none twice."""
    return _job(made, settings, heldout_events, settings.backlog)


def make_plant_job(made: DecisionContenders, settings: DecisionSettings) -> Job:
    """Events of a few machines that report again and again, which is what a gateway sees; none twice, nobody waits."""
    return _job(made, settings, plant_events, 0)


def _job(
    made: DecisionContenders, settings: DecisionSettings, stream: Callable[[int], list[Event]], backlog: int
) -> Job:
    warm_end = settings.warm
    measured_end = warm_end + settings.events
    backlog_end = measured_end + backlog
    count = backlog_end + settings.history
    found = prompts(made.task, made.checkpoint, stream(2 * count))[:count]
    if len(found) < count:
        raise ValueError(f"{count} events are wanted, {len(found)} read otherwise than any before")
    if MODELS[made.name] is not None:  # random weights would answer nearly all of them alike
        decisions = trained_decisions([one.event for one in found])
        found = [replace(one, decision=decision) for one, decision in zip(found, decisions, strict=True)]
    fields = made.task.output_fields
    return Job(
        task=made.task.name,
        warm=found[:warm_end],
        measured=found[warm_end:measured_end],
        backlog=found[measured_end:backlog_end],
        history=found[backlog_end:],
        prefix_tokens=_shared_tokens([prompt.ids for prompt in found]),
        max_answer_tokens=MAX_ANSWER_TOKENS,
        gbnf=gbnf(fields),
        regex=regex(fields),
        threads=settings.threads,
    )


def check_answers(task: TaskSpec, run: EngineRun) -> None:
    """An engine that is fast because it answers something else is not compared.

    Raises:
        CommandFailedError: an answer is not compact JSON of the task's schema.
    """
    for answer in run.answers:
        try:
            decision = json.loads(answer.text)
        except ValueError as error:
            raise CommandFailedError(f"answered {answer.text!r}, which is no JSON") from error
        problems = task.check_decision(decision)
        if problems or json.dumps(decision, separators=(",", ":"), ensure_ascii=False) != answer.text:
            raise CommandFailedError(f"answered {answer.text!r}: {'; '.join(problems) or 'not as compact JSON'}")


def _shared_tokens(sequences: Sequence[list[int]]) -> int:
    """Tokens that all begin with: the prefix, and what the event lines share by chance."""
    first, last = min(sequences), max(sequences)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _job_file(job: Job) -> Path:
    path = CACHE / "job.json"
    path.write_text(job.as_json(), "utf-8")
    return path


def _run_ours(bundle: OurBundle, job: Job, *, options: Sequence[str]) -> EngineRun:
    prefixes = CACHE / "prefixes"
    prefixes.mkdir(mode=0o700, exist_ok=True)
    # Whose it is, is asked when a bundle is installed; a worker starts from the digest of what was.
    words: list[str | Path] = ["--digest", bundle.verified().digest, "--prefix-dir", prefixes, *options]
    return run_program(
        [*python_module("tests.bench.engine_decisions", bundle.path, _job_file(job)), *words], environment()
    )


def _run_ogenai(peer: Ogenai, job: Job) -> EngineRun:
    return run_program([peer.python, HERE / "ogenai_decisions.py", peer.model, _job_file(job)], environment())
