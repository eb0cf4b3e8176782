"""Figures of one published shape: what exporting it takes, how large the result is, how fast it decodes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.bench.cache import ROOT
from tests.bench.figures import RATIO, Figure, Target, from_samples
from tests.bench.interleaved import Command, Speeds, paired_ratios, take_turns
from tests.bench.llama_cpp_peer import llama_cpp_python
from tests.bench.made import (
    HELDOUT,
    HERE,
    Built,
    GgufPeer,
    build_bundle,
    gguf_peer,
    optimum_peer,
    python_module,
    synthetic_checkpoint,
)
from tests.bench.measured_run import CommandFailedError

T = TypeVar("T")
Say = Callable[[str], None]
MB, GB = 1e6, 1e9
PRUNED_ROWS = 8192
DEPTHS = (64, 256)
OURS, OPTIMUM, LLAMA_CPP, OURS_PRUNED = "ours", "optimum", "llama.cpp", "ours, 8k-row head"


@dataclass(frozen=True)
class ShapeTargets:
    """What exporting a shape may take on two cores."""

    seconds: float
    peak_rss_gb: float


SHAPES = {"smollm2-135m": ShapeTargets(90, 4), "qwen2.5-0.5b": ShapeTargets(300, 8)}
SIZE = Target(1.02, "lower")
SIZE_PRUNED = Target(0.85, "lower")
DECODE = Target(2.2, "higher")


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure.

    Args:
        rounds: fresh processes of each engine.
        steps: measured one-token passes of a process at each depth.
        threads: of every engine.
        with_llama_cpp: whether llama.cpp is compiled and measured.
    """

    rounds: int = 5
    steps: int = 48
    threads: int = 2
    with_llama_cpp: bool = True


def shape_figures(shape: str, settings: Settings, say: Say) -> list[Figure]:
    """Measure one shape.

    Args:
        shape: a key of `SHAPES`.
        settings: how thoroughly.
        say: is told what happens.

    Returns:
        Its figures; what could not be measured has no value and says why.
    """
    say(f"{shape}: checkpoint")
    checkpoint = synthetic_checkpoint(shape)
    say(f"{shape}: the peers' files")
    gguf = gguf_peer(shape, checkpoint)
    optimum = _attempt(lambda: optimum_peer(shape, checkpoint), say)
    say(f"{shape}: edge-export build")
    built = _attempt(lambda: build_bundle(checkpoint, shape), say)
    say(f"{shape}: edge-export build, {PRUNED_ROWS}-row head")
    rows: list[str | Path] = ["--vocab-from", HELDOUT, "--vocab-rows", str(PRUNED_ROWS)]
    pruned = _attempt(lambda: build_bundle(checkpoint, f"{shape}-head-8k", rows), say)
    say(f"{shape}: decode, {settings.rounds} rounds")
    speeds = _speeds(_commands(built, pruned, optimum, gguf, settings, say), settings, say)
    return [
        *_export_figures(shape, built),
        *_size_figures(shape, built, pruned, gguf, optimum),
        *_decode_figures(shape, speeds),
    ]


@dataclass(frozen=True)
class Missing:
    """Something that could not be made."""

    why: str


def _attempt(make: Callable[[], T], say: Say) -> T | Missing:
    try:
        return make()
    except CommandFailedError as error:
        found = Missing(str(error).splitlines()[-1])
    except subprocess.CalledProcessError as error:
        found = Missing(str(error.stderr or error).strip().splitlines()[-1])
    say(f"not measured: {found.why}")
    return found


def _export_figures(shape: str, built: Built | Missing) -> Iterator[Figure]:
    targets = SHAPES[shape]
    run = None if isinstance(built, Missing) else built.run
    why = built.why if isinstance(built, Missing) else f"by stage: {built.stages}"
    yield Figure(
        f"{shape}.export_seconds",
        f"{shape}: export",
        None if run is None else run.seconds,
        "s",
        Target(targets.seconds, "lower"),
        note=why,
    )
    yield Figure(
        f"{shape}.export_peak_rss",
        f"{shape}: peak memory of the export",
        None if run is None else run.peak_rss_bytes / GB,
        "GB",
        Target(targets.peak_rss_gb, "lower"),
        note=built.why if isinstance(built, Missing) else "",
    )


def _size_figures(
    shape: str, built: Built | Missing, pruned: Built | Missing, gguf: GgufPeer, optimum: Path | Missing
) -> Iterator[Figure]:
    yield Figure(f"{shape}.gguf_mb", f"{shape}: llama.cpp Q4_0 --pure, the file", gguf.file_bytes / MB, "MB")
    yield Figure(
        f"{shape}.gguf_default_mb",
        f"{shape}: llama.cpp Q4_0, default mix, the file",
        gguf.default_mix_bytes / MB,
        "MB",
        note="computed: llama-quantize keeps a tied embedding at Q8_0 (Q6_K where a row is a multiple of 256)",
    )
    if not isinstance(optimum, Missing):
        optimum_bytes = sum(file.stat().st_size for file in optimum.iterdir() if file.name.startswith("model."))
        yield Figure(f"{shape}.optimum_mb", f"{shape}: optimum + MatMulNBits, the graph", optimum_bytes / MB, "MB")
    for name, label, found, target in (
        ("", "INT4", built, SIZE),
        ("_head_8k", "INT4 with an 8k-row head", pruned, SIZE_PRUNED),
    ):
        yield from _size_of(f"{shape}.", name, f"{shape}: {label}", found, gguf, target)


def _size_of(
    prefix: str, name: str, label: str, found: Built | Missing, gguf: GgufPeer, target: Target
) -> Iterator[Figure]:
    if isinstance(found, Missing):
        yield Figure(f"{prefix}size_ratio{name}", f"{label} / Q4_0 --pure", None, RATIO, target, note=found.why)
        return
    size, tokenizer = found.graph_bytes, (found.bundle / "tokenizer.json").stat().st_size
    yield Figure(f"{prefix}int4{name}_mb", f"{label}, the graph", size / MB, "MB")
    yield Figure(
        f"{prefix}size_ratio{name}",
        f"{label} / Q4_0 --pure, both without the tokenizer",
        size / gguf.tensor_bytes,
        RATIO,
        target,
    )
    whole = size + tokenizer
    yield Figure(
        f"{prefix}size_ratio{name}_whole",
        f"{label} / Q4_0 --pure, both with the tokenizer",
        whole / gguf.file_bytes,
        RATIO,
    )
    yield Figure(
        f"{prefix}size_ratio{name}_default",
        f"{label} / Q4_0 default mix, both with the tokenizer",
        whole / gguf.default_mix_bytes,
        RATIO,
    )


def _commands(
    built: Built | Missing,
    pruned: Built | Missing,
    optimum: Path | Missing,
    gguf: GgufPeer,
    settings: Settings,
    say: Say,
) -> dict[str, Command]:
    options = ["--steps", str(settings.steps), "--threads", str(settings.threads), "--depths", *map(str, DEPTHS)]
    commands: dict[str, Command] = {}
    if not isinstance(built, Missing):
        commands[OURS] = python_module("tests.bench.decode_passes", "fused", built.bundle, *options)
    if not isinstance(optimum, Missing):
        commands[OPTIMUM] = python_module("tests.bench.decode_passes", "optimum", optimum, *options)
    if not isinstance(pruned, Missing):
        commands[OURS_PRUNED] = python_module("tests.bench.decode_passes", "fused", pruned.bundle, *options)
    if settings.with_llama_cpp:
        python = _attempt(llama_cpp_python, say)
        if not isinstance(python, Missing):
            commands[LLAMA_CPP] = [python, HERE / "llama_cpp_passes.py", gguf.path, *options]
    return commands


def _speeds(commands: Mapping[str, Command], settings: Settings, say: Say) -> Mapping[str, Speeds] | Missing:
    return _attempt(lambda: take_turns(commands, settings.rounds, ROOT), say)


def _decode_figures(shape: str, speeds: Mapping[str, Speeds] | Missing) -> Iterator[Figure]:
    for depth in DEPTHS:
        key, label = f"{shape}.decode_ratio_{depth}", f"{shape}: decode, ours / optimum, past {depth}"
        if isinstance(speeds, Missing) or not {OURS, OPTIMUM} <= speeds.keys():
            why = speeds.why if isinstance(speeds, Missing) else "one of the two could not be made"
            yield Figure(key, label, None, RATIO, DECODE, note=why)
            continue
        ours = speeds[OURS].decode_tok_per_s[depth]
        yield _of_samples(key, label, paired_ratios(ours, speeds[OPTIMUM].decode_tok_per_s[depth]), RATIO, DECODE)
        if LLAMA_CPP in speeds:
            ratios = paired_ratios(ours, speeds[LLAMA_CPP].decode_tok_per_s[depth])
            label = f"{shape}: decode, ours / llama.cpp, past {depth}"
            yield _of_samples(f"{shape}.decode_llama_cpp_{depth}", label, ratios, RATIO)
        for name, found in speeds.items():
            slug = name.replace(", ", "_").replace(" ", "_").replace(".", "_")
            for kind, by_depth in (("decode", found.decode_tok_per_s), ("prefill", found.prefill_tok_per_s)):
                key, label = f"{shape}.{kind}_{slug}_{depth}", f"{shape}: {kind}, {name}, past {depth}"
                if kind == "prefill":
                    label = f"{shape}: prefill of {depth}, {name}"
                yield _of_samples(key, label, by_depth[depth], "tok/s")


def _of_samples(key: str, label: str, samples: list[float], unit: str, target: Target | None = None) -> Figure:
    value, spread = from_samples(samples)
    return Figure(key, label, value, unit, target, spread)
