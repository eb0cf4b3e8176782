"""What the runs of one model come to, as figures of the page. Pure: no clock, no process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

from tests.bench.decision_ratios import (
    backlog_ms,
    corrected_ratio,
    equal_output_ms,
    mean_latency_ms,
    processor_ms,
    processor_ratio,
    raw_ratio,
    without_grammar_ratio,
)
from tests.bench.decision_runs import EngineRun, Turns
from tests.bench.figures import RATIO, Figure, Target, from_samples
from tests.bench.llama_server_decisions import SLOTS

OURS_PLAIN, OURS_INT4 = "ours_without_drafts", "ours_int4"
OURS, LLAMA, LLAMA_SLOTS, OGENAI = "ours", "llamacpp", f"llamacpp_{SLOTS}_slots", "ogenai"
LLAMA_MAPPED, LLAMA_REMEMBERING = "llamacpp_mapped", "llamacpp_remembering"
NOT_MADE = "one of the two could not be made"
MB = 1e6
DECISIONS = "decisions per second, ours / "


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


def ratio_figures(name: str, turns: Turns) -> Iterator[Figure]:
    """Ours in proportion to the peers', one event at a time."""
    vs_llama, vs_ogenai = _decision_targets(name)
    ratio = partial(_ratio, name, turns)
    yield ratio(
        "decisions_vs_llamacpp_corrected",
        f"{DECISIONS}llama.cpp, equal output",
        LLAMA,
        corrected_ratio,
        target=vs_llama,
    )
    yield ratio("decisions_vs_llamacpp_raw", f"{DECISIONS}llama.cpp, as measured", LLAMA, raw_ratio)
    yield ratio(
        "decisions_vs_llamacpp_free_grammar",
        f"{DECISIONS}llama.cpp, equal output, its grammar for nothing",
        LLAMA,
        without_grammar_ratio,
    )
    yield ratio(
        "decisions_vs_ogenai",
        f"{DECISIONS}onnxruntime-genai, equal output",
        OGENAI,
        corrected_ratio,
        target=vs_ogenai,
    )
    yield ratio("decisions_vs_ogenai_raw", f"{DECISIONS}onnxruntime-genai, as measured", OGENAI, raw_ratio)
    yield ratio(
        "processor_vs_llamacpp", "processor time of a decision, llama.cpp / ours, as measured", LLAMA, processor_ratio
    )
    yield ratio(
        "processor_vs_ogenai",
        "processor time of a decision, onnxruntime-genai / ours, as measured",
        OGENAI,
        processor_ratio,
    )
    for engine, slug, words in (
        (OURS_PLAIN, "without_drafts", "ours without drafts"),
        (OURS_INT4, "int4", "ours in four bits"),
    ):
        other = turns.runs.get(engine)
        if other and LLAMA in turns.runs:
            samples = [corrected_ratio(their, our) for their, our in zip(turns.runs[LLAMA], other, strict=True)]
            value, spread = from_samples(samples)
            label = f"{name}: {DECISIONS}llama.cpp, equal output, {words}"
            yield Figure(f"{name}.decisions_vs_llamacpp_{slug}", label, value, RATIO, None, spread)
    # Of a process that has answered what the peer's has, and no history.
    memory = partial(ratio, of=_memory_ratio, ours=OURS_PLAIN if OURS_PLAIN in turns.runs else OURS)
    least = AT_MOST_EVEN if name in TARGETS else None
    words = "peak memory, ours / "
    yield memory("rss_vs_llamacpp", f"{words}llama.cpp, its weights read, not mapped", LLAMA, target=least)
    yield memory("rss_vs_llamacpp_mapped", f"{words}llama.cpp as it starts by default", LLAMA_MAPPED, target=least)
    yield memory("rss_vs_ogenai", f"{words}onnxruntime-genai", OGENAI)


def plant_figures(name: str, turns: Turns) -> Iterator[Figure]:
    """The same on events of machines that were heard of before; llama.cpp's better way to remember prompts counts."""
    vs_llama, vs_ogenai = _decision_targets(name)
    ours, single, remembering = (turns.runs.get(engine, []) for engine in (OURS, LLAMA, LLAMA_REMEMBERING))
    runs = dict(turns.runs)
    if ours and single and remembering:
        runs[LLAMA] = [_faster(ways, our) for our, *ways in zip(ours, single, remembering, strict=True)]
    ratio = partial(_ratio, name, Turns(runs, turns.failed))
    plant = f"a plant's events, {DECISIONS}"
    yield ratio(
        "plant_vs_llamacpp_corrected", f"{plant}llama.cpp, equal output", LLAMA, corrected_ratio, target=vs_llama
    )
    yield ratio("plant_vs_llamacpp_raw", f"{plant}llama.cpp, as measured", LLAMA, raw_ratio)
    yield ratio("plant_vs_ogenai", f"{plant}onnxruntime-genai, equal output", OGENAI, corrected_ratio, target=vs_ogenai)
    for engine, words in {
        OURS: "ours",
        OURS_PLAIN: "ours without drafts",
        LLAMA: "llama.cpp",
        LLAMA_REMEMBERING: "llama.cpp, prompts kept",
        OGENAI: "onnxruntime-genai",
    }.items():
        if found := turns.runs.get(engine):
            label = f"{name}: a plant's events, {words}"
            yield _of_runs(f"{name}.plant_{engine}_ms", f"{label}, a decision", found, _mean_ms, "ms")
            read = [mean(answer.prompt_tokens for answer in run.answers) for run in found]
            if any(read):
                value, spread = from_samples(read)
                label = f"{label}, prompt tokens read"
                yield Figure(f"{name}.plant_{engine}_prompt_tokens", label, value, "tokens", None, spread)


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


def own_figures(name: str, every: Mapping[str, list[EngineRun]]) -> Iterator[Figure]:
    """Our own, in absolute numbers; of an engine that is told its answers only where there is no other."""
    runs = every.get(OURS_PLAIN) or every.get(OURS, [])
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
        OURS_PLAIN: "ours without drafts",
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
        if engine not in {OURS, OURS_PLAIN, OURS_INT4}:
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


def _decision_targets(name: str) -> tuple[Target | None, Target | None]:
    """What a model should reach beside llama.cpp, and beside onnxruntime-genai."""
    targets = TARGETS.get(name)
    if targets is None:
        return None, None
    return Target(targets.llamacpp, "higher"), Target(targets.ogenai, "higher")


def _ratio(
    name: str,
    turns: Turns,
    key: str,
    label: str,
    peer: str,
    of: Callable[[EngineRun, EngineRun], float | None],
    *,
    ours: str = OURS,
    target: Target | None = None,
) -> Figure:
    """Ours beside a peer's, formed within each round; without a value where one of them is missing."""
    label, key = f"{name}: {label}", f"{name}.{key}"
    pairs = zip(turns.runs.get(peer, []), turns.runs.get(ours, []), strict=False)
    samples = [value for their, our in pairs if (value := of(their, our)) is not None]
    if not samples:
        why = next((turns.failed[engine] for engine in (ours, peer) if engine in turns.failed), NOT_MADE)
        return Figure(key, label, None, RATIO, target, note=why)
    value, spread = from_samples(samples)
    return Figure(key, label, value, RATIO, target, spread)


def _memory_ratio(theirs: EngineRun, ours: EngineRun) -> float:
    return ours.peak_rss_bytes / theirs.peak_rss_bytes


def _faster(ways: Sequence[EngineRun], our: EngineRun) -> EngineRun:
    """Of a peer's runs the faster one at equal output."""
    return min(ways, key=lambda run: equal_output_ms(run.answers, our.answers))


def _mean_ms(run: EngineRun) -> float:
    return mean_latency_ms(run.answers)


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
