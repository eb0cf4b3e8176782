"""Decisions per second of one model: ours beside llama.cpp's server and onnxruntime-genai, as figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from edge_agent.contract.task import TaskSpec
from tests.bench.answer_grammars import gbnf, regex
from tests.bench.attempts import Missing, Say, attempt
from tests.bench.cache import CACHE
from tests.bench.decision_contenders import DecisionContenders, LlamaServer, Ogenai, OurBundle
from tests.bench.decision_ratios import (
    backlog_ms,
    corrected_ratio,
    mean_latency_ms,
    processor_ms,
    processor_ratio,
    raw_ratio,
    without_grammar_ratio,
)
from tests.bench.decision_runs import EngineRun, Job, Turns, run_program, take_turns
from tests.bench.decision_task import prompts
from tests.bench.figures import RATIO, Figure, Target, from_samples
from tests.bench.llama_server_decisions import (
    SETTINGS,
    SLOTS,
    Setting,
    all_waiting,
    as_by_default,
    best_setting,
    few_events,
    one_at_a_time,
)
from tests.bench.made import HERE, python_module
from tests.bench.measured_run import CommandFailedError
from tests.bench.ogenai_peer import environment

OURS_DRAFTS, OURS_INT4 = "ours_drafts", "ours_int4"
OURS, LLAMA, LLAMA_SLOTS, OGENAI = "ours", "llamacpp", f"llamacpp_{SLOTS}_slots", "ogenai"
LLAMA_MAPPED = "llamacpp_mapped"
MAX_ANSWER_TOKENS = 128
NOT_MADE = "one of the two could not be made"
MB = 1e6


@dataclass(frozen=True)
class DecisionTargets:
    """What a model should reach on two cores.

    Args:
        llamacpp: times as many decisions a second as llama.cpp's server, at equal output.
        ogenai: times as many as onnxruntime-genai, at equal output.
        first_decision_s: from the process's start.
    """

    llamacpp: float
    ogenai: float
    first_decision_s: float


MODELS = {"135m": "smollm2-135m", "0.5b": "qwen2.5-0.5b", "reference": None}
"""Name -> published shape with random weights, or None for the trained model of this repository."""
TARGETS = {"135m": DecisionTargets(6.0, 2.5, 0.6), "0.5b": DecisionTargets(3.5, 2.0, 1.2)}
AT_LEAST_EVEN, AT_MOST_EVEN = Target(1.0, "higher"), Target(1.0, "lower")
CACHE_SPEEDUP = Target(50.0, "higher")


@dataclass(frozen=True)
class DecisionSettings:
    """How thoroughly to measure.

    Args:
        rounds: fresh processes of each engine.
        warm: events of a process that are not measured.
        events: that are answered one at a time.
        backlog: that are all waiting.
        threads: of every engine.
        with_trials: whether llama-server's settings are tried; without, it gets the first.
    """

    rounds: int = 3
    warm: int = 4
    events: int = 24
    backlog: int = 24
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
    job = make_job(made, settings)
    engines: dict[str, Callable[[], EngineRun]] = {}
    tried: dict[str, float] = {}
    if isinstance(made.ours, OurBundle):
        trained = MODELS[made.name] is None
        engines[OURS] = partial(_run_ours, made.ours, job, with_drafts=trained)
        if not trained:
            engines[OURS_DRAFTS] = partial(_run_ours, made.ours, job, with_drafts=True)
        if isinstance(made.ours_int4, OurBundle):
            engines[OURS_INT4] = partial(_run_ours, made.ours_int4, job, with_drafts=trained)
            attempt(engines[OURS_INT4], say)
        # Leaves the prefix's state on the disk, where every start but a device's first finds it.
        attempt(engines[OURS], say)
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
    if isinstance(made.ogenai, Ogenai):
        engines[OGENAI] = partial(_run_ogenai, made.ogenai, job)
    say(f"{made.name}: decisions, {settings.rounds} rounds")
    turns = take_turns(engines, settings.rounds, partial(check_answers, made.task))
    for engine, why in turns.failed.items():
        say(f"not compared: {engine}: {why}")
    return [
        *ratio_figures(made.name, turns),
        *backlog_figures(made.name, turns.runs),
        *own_figures(made.name, turns.runs.get(OURS, [])),
        *engine_figures(made.name, turns.runs),
        *tried_figures(made.name, tried),
    ]


def make_job(made: DecisionContenders, settings: DecisionSettings) -> Job:
    """The same events for every engine, none twice."""
    count = settings.warm + settings.events + settings.backlog
    found = prompts(made.task, made.checkpoint, count)
    measured_end = settings.warm + settings.events
    fields = made.task.output_fields
    return Job(
        task=made.task.name,
        warm=found[: settings.warm],
        measured=found[settings.warm : measured_end],
        backlog=found[measured_end:],
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


def ratio_figures(name: str, turns: Turns) -> Iterator[Figure]:
    """Ours in proportion to the peers', one event at a time."""
    targets = TARGETS.get(name)
    llama_target = Target(targets.llamacpp, "higher") if targets else None
    ogenai_target = Target(targets.ogenai, "higher") if targets else None
    ours = turns.runs.get(OURS, [])

    def ratio(
        key: str,
        label: str,
        peer: str,
        of: Callable[[EngineRun, EngineRun], float | None],
        target: Target | None = None,
    ) -> Figure:
        label, key = f"{name}: {label}", f"{name}.{key}"
        theirs = turns.runs.get(peer, [])
        found = [of(their, our) for their, our in zip(theirs, ours, strict=False)]
        samples = [value for value in found if value is not None]
        if not samples:
            why = next((turns.failed[engine] for engine in (OURS, peer) if engine in turns.failed), NOT_MADE)
            return Figure(key, label, None, RATIO, target, note=why)
        value, spread = from_samples(samples)
        return Figure(key, label, value, RATIO, target, spread)

    decisions = "decisions per second, ours / "
    yield ratio(
        "decisions_vs_llamacpp_corrected", f"{decisions}llama.cpp, equal output", LLAMA, corrected_ratio, llama_target
    )
    yield ratio("decisions_vs_llamacpp_raw", f"{decisions}llama.cpp, as measured", LLAMA, raw_ratio)
    yield ratio(
        "decisions_vs_llamacpp_free_grammar",
        f"{decisions}llama.cpp, equal output, its grammar for nothing",
        LLAMA,
        without_grammar_ratio,
    )
    yield ratio(
        "decisions_vs_ogenai", f"{decisions}onnxruntime-genai, equal output", OGENAI, corrected_ratio, ogenai_target
    )
    yield ratio("decisions_vs_ogenai_raw", f"{decisions}onnxruntime-genai, as measured", OGENAI, raw_ratio)
    yield ratio(
        "processor_vs_llamacpp", "processor time of a decision, llama.cpp / ours, as measured", LLAMA, processor_ratio
    )
    yield ratio(
        "processor_vs_ogenai",
        "processor time of a decision, onnxruntime-genai / ours, as measured",
        OGENAI,
        processor_ratio,
    )
    for engine, slug, words in ((OURS_DRAFTS, "drafts", "our drafts on"), (OURS_INT4, "int4", "ours in four bits")):
        other = turns.runs.get(engine)
        if other and LLAMA in turns.runs:
            samples = [corrected_ratio(their, our) for their, our in zip(turns.runs[LLAMA], other, strict=True)]
            value, spread = from_samples(samples)
            label = f"{name}: {decisions}llama.cpp, equal output, {words}"
            yield Figure(f"{name}.decisions_vs_llamacpp_{slug}", label, value, RATIO, None, spread)
    memory_target = AT_MOST_EVEN if targets else None
    yield ratio("rss_vs_llamacpp", "peak memory, ours / llama.cpp", LLAMA, _memory_ratio, memory_target)
    yield ratio(
        "rss_vs_llamacpp_mapped", "peak memory, ours / llama.cpp as it starts by default", LLAMA_MAPPED, _memory_ratio
    )
    yield ratio("rss_vs_ogenai", "peak memory, ours / onnxruntime-genai", OGENAI, _memory_ratio)


def backlog_figures(name: str, runs: Mapping[str, list[EngineRun]]) -> Iterator[Figure]:
    """The same when all events are waiting; a peer's better way counts."""
    ours, single, slots = (runs.get(engine, []) for engine in (OURS, LLAMA, LLAMA_SLOTS))
    label = f"{name}: backlog, decisions per second"
    if not (ours and single and slots):
        return
    for key, words, equal in (("raw", "as measured", False), ("corrected", "equal output", True)):
        ratios = []
        for our, one, many in zip(ours, single, slots, strict=True):
            theirs = min(backlog_ms(run, equal_to=our if equal else None) for run in (one, many))
            ratios.append(theirs / backlog_ms(our))
        value, spread = from_samples(ratios)
        yield Figure(
            f"{name}.backlog_vs_llamacpp_{key}", f"{label}, ours / llama.cpp, {words}", value, RATIO, None, spread
        )
    for engine, words, found in (
        (OURS, "ours", ours),
        (LLAMA, "llama.cpp, one slot", single),
        (LLAMA_SLOTS, f"llama.cpp, {SLOTS} slots", slots),
    ):
        yield _of_runs(
            f"{name}.backlog_{engine}_per_s", f"{label}, {words}", found, lambda r: 1000 / backlog_ms(r), "/s"
        )


def own_figures(name: str, runs: Sequence[EngineRun]) -> Iterator[Figure]:
    """Our own, in absolute numbers."""
    targets = TARGETS.get(name)
    first_target = Target(targets.first_decision_s, "lower") if targets else None
    key, label = f"{name}.first_decision_s", f"{name}: from the process's start to the first decision"
    if not runs:
        yield Figure(key, label, None, "s", first_target, note="our bundle could not be made")
        return
    yield _of_runs(key, label, runs, lambda run: run.first_decision_s, "s", first_target)
    repeats = [run.repeats_per_s * mean_latency_ms(run.answers) / 1000 for run in runs if run.repeats_per_s is not None]
    key, label = f"{name}.cache_speedup", f"{name}: repeated events / new events, decisions per second"
    if repeats:
        value, spread = from_samples(repeats)
        yield Figure(key, label, value, RATIO, CACHE_SPEEDUP if targets else None, spread)
    else:
        note = "no repeated events were asked for"
        yield Figure(key, label, None, RATIO, CACHE_SPEEDUP if targets else None, note=note)


def engine_figures(name: str, runs: Mapping[str, list[EngineRun]]) -> Iterator[Figure]:
    """Every engine's own rate, and what its time is made of."""
    ours = runs.get(OURS, [])
    for engine, label in {
        OURS: "ours",
        OURS_DRAFTS: "ours with drafts",
        OURS_INT4: "ours in four bits",
        LLAMA: "llama.cpp",
        OGENAI: "onnxruntime-genai",
    }.items():
        found = runs.get(engine, [])
        if not found:
            continue
        differ = found[0].prompts_differ
        note = f"{differ} prompts are other tokens in its own tokenizer, so all were given as tokens" if differ else ""
        key, title = f"{name}.{engine}", f"{name}: {label}"
        rate, spread = from_samples([1000 / mean_latency_ms(run.answers) for run in found])
        yield Figure(f"{key}_per_s", f"{title}, decisions per second", rate, "/s", None, spread, note)
        for what, words in _PARTS.items():
            means = [mean(getattr(answer, what) for answer in run.answers) for run in found]
            if any(means):
                value, spread = from_samples(means)
                unit = "tokens" if what.endswith("tokens") else "ms"
                yield Figure(f"{key}_{what}", f"{title}, {words}", value, unit, None, spread)
        if all(run.processor_s for run in found):
            words = "processor time of a decision, all cores together"
            yield _of_runs(f"{key}_processor_ms", f"{title}, {words}", found, processor_ms, "ms")
        yield _of_runs(f"{key}_rss_mb", f"{title}, peak memory", found, lambda run: run.peak_rss_bytes / MB, "MB")
        if engine not in {OURS, OURS_DRAFTS, OURS_INT4}:
            words = "from the process's start to the first decision"
            yield _of_runs(f"{key}_first_decision_s", f"{title}, {words}", found, lambda run: run.first_decision_s, "s")
        if engine == LLAMA and (mapped := runs.get(LLAMA_MAPPED)):
            words = "peak memory as it starts by default"
            yield _of_runs(f"{key}_mapped_rss_mb", f"{title}, {words}", mapped, lambda r: r.peak_rss_bytes / MB, "MB")
        if engine != OURS and ours and MODELS[name] is None:
            yield Figure(f"{key}_agrees", f"{title}, same answers as ours", same_answers(found[0], ours[0]), "%")


def tried_figures(name: str, tried: Mapping[str, float]) -> Iterator[Figure]:
    """What the settings of llama-server came to."""
    for position, (setting, ms) in enumerate(tried.items()):
        yield Figure(f"{name}.llamacpp_tried_{position}", f"{name}: llama-server tried with {setting}", ms, "ms")


def same_answers(one: EngineRun, other: EngineRun) -> float:
    """Share of events that both answered alike, in percent."""
    return 100 * mean(a.text == b.text for a, b in zip(one.answers, other.answers, strict=True))


_PARTS = {
    "latency_ms": "a decision",
    "prompt_ms": "of it reading the prompt",
    "generate_ms": "of it from the first token to the last",
    "prompt_tokens": "prompt tokens read",
    "tokens": "tokens of an answer",
}


def _memory_ratio(theirs: EngineRun, ours: EngineRun) -> float:
    return ours.peak_rss_bytes / theirs.peak_rss_bytes


def _of_runs(
    key: str,
    label: str,
    runs: Sequence[EngineRun],
    of: Callable[[EngineRun], float],
    unit: str,
    target: Target | None = None,
) -> Figure:
    value, spread = from_samples([of(run) for run in runs])
    return Figure(key, label, value, unit, target, spread)


def _shared_tokens(sequences: Sequence[list[int]]) -> int:
    """Tokens that all begin with: the prefix, and what the event lines share by chance."""
    first, last = min(sequences), max(sequences)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _job_file(job: Job) -> Path:
    path = CACHE / "job.json"
    path.write_text(job.as_json(), "utf-8")
    return path


def _run_ours(bundle: OurBundle, job: Job, *, with_drafts: bool) -> EngineRun:
    prefixes = CACHE / "prefixes"
    prefixes.mkdir(mode=0o700, exist_ok=True)
    options: list[str | Path] = ["--prefix-dir", prefixes, *([] if with_drafts else ["--without-drafts"])]
    # Whose it is, is asked when a bundle is installed; a worker starts from the digest of what was.
    options += ["--digest", bundle.verified().digest]
    return run_program(
        [*python_module("tests.bench.engine_decisions", bundle.path, _job_file(job)), *options], environment()
    )


def _run_ogenai(peer: Ogenai, job: Job) -> EngineRun:
    return run_program([peer.python, HERE / "ogenai_decisions.py", peer.model, _job_file(job)], environment())
