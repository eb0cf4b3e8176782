"""Decisions per second, beside llama.cpp's server and onnxruntime-genai on the same weights.

    python -m tests.bench.decision_figures                              # the 135M shape
    python -m tests.bench.decision_figures --model all --write-docs     # every model; rewrites docs/benchmarks.*
    python -m tests.bench.decision_figures --rounds 1 --events 6 --backlog 6 --without-passes --without-trials

What is slow to make and always the same (checkpoints, bundles, peers) is kept under ``build/bench``.
Ends with status 1 when a ratio that met its target on the committed page has fallen back by more than 15 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.attempts import Missing, Say, attempt
from tests.bench.cache import ROOT
from tests.bench.contenders import LLAMA_CPP, OURS_PRUNED
from tests.bench.decision_contenders import (
    DecisionContenders,
    LlamaServer,
    OurBundle,
    bundle_for_tokens,
    make_decision_contenders,
)
from tests.bench.decision_model import DecisionSettings, decision_figures
from tests.bench.decision_rows import AT_LEAST_EVEN, MODELS, TARGETS
from tests.bench.decisions_page import as_json, committed_decisions, machine, write_page
from tests.bench.export_figures import BUSY_SHARE, STDOUT
from tests.bench.figures import RATIO, Figure, fallen_back, from_samples, table
from tests.bench.interleaved import Command, Speeds, paired_ratios
from tests.bench.interleaved import take_turns as take_passes
from tests.bench.llama_cpp_peer import llama_cpp_python
from tests.bench.made import HERE, python_module

DEPTH = 256
OURS_INT8 = f"{OURS_PRUNED}, eight bits"
OURS_TOKENS = f"{OURS_PRUNED}, blocks of 128, int8 caches"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    arguments = _arguments(argv)
    settings = DecisionSettings(
        rounds=arguments.rounds,
        events=arguments.events,
        backlog=arguments.backlog,
        threads=arguments.threads,
        with_trials=not arguments.without_trials,
    )
    found_machine = machine()
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started_s:5.0f} s] {line}", file=sys.stderr, flush=True)

    if found_machine["load_before"] > BUSY_SHARE * found_machine["cores"]:
        say(f"the machine is busy (load {found_machine['load_before']}): times will say more about that than about us")
    figures: list[Figure] = []
    for name in MODELS if "all" in arguments.model else arguments.model:
        made = make_decision_contenders(name, MODELS[name], say)
        figures += decision_figures(made, settings, say)
        if not arguments.without_passes and name in TARGETS:
            figures += passes_figures(made, arguments.rounds, arguments.steps, arguments.threads, say)
    say("done")
    if arguments.json == STDOUT:
        sys.stdout.write(as_json(figures, found_machine))
    else:
        print("\n".join(table(figures)))
        if arguments.json:
            Path(arguments.json).write_text(as_json(figures, found_machine), "utf-8")
    fallen = fallen_back(committed_decisions(), figures)
    if arguments.write_docs:
        write_page(figures, found_machine, sys.argv[1:] if argv is None else argv)
    for sentence in fallen:
        print(f"fallen back: {sentence}", file=sys.stderr)
    return 1 if fallen else 0


def passes_figures(made: DecisionContenders, rounds: int, steps: int, threads: int, say: Say) -> list[Figure]:
    """Raw speed at a past of `DEPTH` tokens: one-token passes, and the prefill before them."""
    say(f"{made.name}: one-token passes and prefill, {rounds} rounds")
    python = attempt(llama_cpp_python, say)
    shape = MODELS[made.name]
    for_tokens: OurBundle | Missing = Missing("the trained model has no figures of this kind")
    if shape is not None:
        for_tokens = attempt(lambda: bundle_for_tokens(shape, made.checkpoint), say)
    contenders = (made.ours, made.ours_int4, for_tokens, made.llama, python)
    missing = next((part for part in contenders if isinstance(part, Missing)), None)
    speeds: dict[str, Speeds] | Missing = missing or Missing("left out")
    ours, ours_int4 = made.ours, made.ours_int4
    if (
        isinstance(ours, OurBundle)
        and isinstance(ours_int4, OurBundle)
        and isinstance(for_tokens, OurBundle)
        and isinstance(made.llama, LlamaServer)
        and isinstance(python, Path)
    ):
        options = ["--steps", str(steps), "--threads", str(threads), "--depths", str(DEPTH)]
        commands: dict[str, Command] = {
            OURS_PRUNED: python_module("tests.bench.decode_passes", "fused", ours_int4.path, *options),
            OURS_INT8: python_module("tests.bench.decode_passes", "fused", ours.path, *options),
            OURS_TOKENS: python_module("tests.bench.decode_passes", "fused", for_tokens.path, *options),
            LLAMA_CPP: [python, HERE / "llama_cpp_passes.py", made.llama.gguf, *options],
        }
        speeds = attempt(lambda: take_passes(commands, rounds, ROOT), say)
    return list(_passes(made.name, speeds))


def _passes(name: str, speeds: dict[str, Speeds] | Missing) -> Iterator[Figure]:
    for what, words in (("decode", f"one-token passes, past {DEPTH}"), ("prefill", f"prefill of {DEPTH} tokens")):
        key, label = f"{name}.{what}_vs_llamacpp", f"{name}: {words}"
        if isinstance(speeds, Missing):
            yield Figure(key, f"{label}, ours / llama.cpp", None, RATIO, AT_LEAST_EVEN, note=speeds.why)
            continue
        samples = {engine: getattr(found, f"{what}_tok_per_s")[DEPTH] for engine, found in speeds.items()}
        # Each with the form that an exporter would choose for it: four bits and small caches read least, eight bits
        # multiply fastest.
        best = OURS_TOKENS if what == "decode" else OURS_INT8
        slugs = {OURS_TOKENS: "ours_tokens", OURS_PRUNED: "ours_int4", OURS_INT8: "ours_int8"}
        for engine in sorted(slugs, key=lambda engine: engine != best):
            value, spread = from_samples(paired_ratios(samples[engine], samples[LLAMA_CPP]))
            title = f"{label}, {engine} / llama.cpp"
            suffix, target = ("", AT_LEAST_EVEN) if engine == best else (f"_{slugs[engine]}", None)
            yield Figure(f"{key}{suffix}", title, value, RATIO, target, spread)
        for engine, slug in (*slugs.items(), (LLAMA_CPP, "llamacpp")):
            value, spread = from_samples(samples[engine])
            yield Figure(f"{name}.{what}_{slug}_tok_per_s", f"{label}, {engine}", value, "tok/s", None, spread)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.decision_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", choices=(*MODELS, "all"), default=[next(iter(MODELS))])
    parser.add_argument("--rounds", type=int, default=DecisionSettings.rounds, help="fresh processes of each engine")
    parser.add_argument("--events", type=int, default=DecisionSettings.events, help="answered one at a time")
    parser.add_argument("--backlog", type=int, default=DecisionSettings.backlog, help="events that are all waiting")
    parser.add_argument("--steps", type=int, default=48, help="one-token passes of a process")
    parser.add_argument("--threads", type=int, default=DecisionSettings.threads)
    parser.add_argument(
        "--without-passes", action="store_true", help="decisions only (spares another build of llama.cpp)"
    )
    parser.add_argument("--without-trials", action="store_true", help="give llama-server the first of its settings")
    parser.add_argument("--json", metavar="FILE", help=f"write the figures there; {STDOUT} prints them alone")
    parser.add_argument("--write-docs", action="store_true", help="rewrite docs/benchmarks.md and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
