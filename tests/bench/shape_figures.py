"""Figures of one published shape: what exporting it takes, how large the result is, how fast it decodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.bench.attempts import Missing, Say, attempt
from tests.bench.cache import ROOT
from tests.bench.contenders import LLAMA_CPP, OPTIMUM, OURS, Contenders, decode_commands, make_contenders
from tests.bench.figures import RATIO, Figure, Target, from_samples
from tests.bench.interleaved import Speeds, paired_ratios, take_turns
from tests.bench.made import Built, GgufPeer

MB, GB = 1e6, 1e9
DEPTHS = (64, 256)


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
    contenders = make_contenders(shape, say, with_llama_cpp=settings.with_llama_cpp)
    say(f"{shape}: decode, {settings.rounds} rounds")
    options = ["--steps", str(settings.steps), "--threads", str(settings.threads), "--depths", *map(str, DEPTHS)]
    commands = decode_commands(contenders, options)
    speeds = attempt(lambda: take_turns(commands, settings.rounds, ROOT), say)
    return [
        *export_figures(shape, contenders.built),
        *size_figures(shape, contenders),
        *decode_figures(shape, speeds),
    ]


def export_figures(shape: str, built: Built | Missing) -> Iterator[Figure]:
    """Time and memory of the build."""
    time_target = Target(SHAPES[shape].seconds, "lower")
    memory_target = Target(SHAPES[shape].peak_rss_gb, "lower")
    time_key, time_label = f"{shape}.export_seconds", f"{shape}: export"
    memory_key, memory_label = f"{shape}.export_peak_rss", f"{shape}: peak memory of the export"
    if isinstance(built, Missing):
        yield Figure(time_key, time_label, None, "s", time_target, note=built.why)
        yield Figure(memory_key, memory_label, None, "GB", memory_target, note=built.why)
        return
    yield Figure(time_key, time_label, built.run.seconds, "s", time_target, note=f"by stage: {built.stages}")
    yield Figure(memory_key, memory_label, built.run.peak_rss_bytes / GB, "GB", memory_target)


def size_figures(shape: str, contenders: Contenders) -> Iterator[Figure]:
    """Sizes of the peers' files, and ours in proportion."""
    gguf, own = contenders.gguf, contenders.quantised_by_llama_cpp
    for name, label, file_bytes in (
        ("pure", "llama.cpp Q4_0 --pure", gguf.file_bytes),
        ("default_mix", "llama.cpp Q4_0, default mix", gguf.default_mix_bytes),
    ):
        note = "" if isinstance(own, Missing) else f"llama.cpp's own quantiser makes {own[name]:,} bytes"
        yield Figure(f"{shape}.gguf_{name}_mb", f"{shape}: {label}, the file", file_bytes / MB, "MB", note=note)
    if not isinstance(contenders.optimum, Missing):
        optimum_bytes = sum(file.stat().st_size for file in contenders.optimum.glob("model.onnx*"))
        yield Figure(f"{shape}.optimum_mb", f"{shape}: optimum + MatMulNBits, the graph", optimum_bytes / MB, "MB")
    yield from _sizes_of(shape, "", "INT4", contenders.built, gguf, SIZE)
    small = "INT4, 8k-row head, rare rows in 2 bits"
    yield from _sizes_of(shape, "_head_8k", small, contenders.pruned, gguf, SIZE_PRUNED)


def _sizes_of(
    shape: str, suffix: str, label: str, bundle: Built | Missing, gguf: GgufPeer, target: Target
) -> Iterator[Figure]:
    key, label = f"{shape}.size_ratio{suffix}", f"{shape}: {label}"
    bare = f"{label} / Q4_0 --pure, both without the tokenizer"
    if isinstance(bundle, Missing):
        yield Figure(key, bare, None, RATIO, target, note=bundle.why)
        return
    size = bundle.graph_bytes
    whole = size + (bundle.bundle / "tokenizer.json").stat().st_size
    yield Figure(f"{shape}.int4{suffix}_mb", f"{label}, the graph", size / MB, "MB")
    rows = "" if bundle.head_rows is None else f"a head of {bundle.head_rows:,} rows"
    yield Figure(key, bare, size / gguf.tensor_bytes, RATIO, target, note=rows)
    yield Figure(f"{key}_whole", f"{label} / Q4_0 --pure, both with the tokenizer", whole / gguf.file_bytes, RATIO)
    yield Figure(
        f"{key}_default", f"{label} / Q4_0 default mix, both with the tokenizer", whole / gguf.default_mix_bytes, RATIO
    )


def decode_figures(shape: str, speeds: Mapping[str, Speeds] | Missing) -> Iterator[Figure]:
    """Decode in proportion to the peers', and every engine's own speeds."""
    for depth in DEPTHS:
        key, label = f"{shape}.decode_ratio_{depth}", f"{shape}: decode, ours / optimum, past {depth}"
        if isinstance(speeds, Missing) or not {OURS, OPTIMUM} <= speeds.keys():
            why = speeds.why if isinstance(speeds, Missing) else "one of the two could not be made"
            yield Figure(key, label, None, RATIO, DECODE, note=why)
            continue
        ours = speeds[OURS].decode_tok_per_s[depth]
        yield _of_rounds(key, label, paired_ratios(ours, speeds[OPTIMUM].decode_tok_per_s[depth]), RATIO, DECODE)
        if LLAMA_CPP in speeds:
            ratios = paired_ratios(ours, speeds[LLAMA_CPP].decode_tok_per_s[depth])
            label = f"{shape}: decode, ours / llama.cpp, past {depth}"
            yield _of_rounds(f"{shape}.decode_ratio_llama_cpp_{depth}", label, ratios, RATIO)
        for name, found in speeds.items():
            slug = name.translate(str.maketrans(" .-", "___", ","))
            decode, prefill = found.decode_tok_per_s[depth], found.prefill_tok_per_s[depth]
            label = f"{shape}: decode, {name}, past {depth}"
            yield _of_rounds(f"{shape}.decode_{slug}_{depth}", label, decode, "tok/s")
            label = f"{shape}: prefill of {depth} tokens, {name}"
            yield _of_rounds(f"{shape}.prefill_{slug}_{depth}", label, prefill, "tok/s")


def _of_rounds(key: str, label: str, samples: list[float], unit: str, target: Target | None = None) -> Figure:
    value, spread = from_samples(samples)
    return Figure(key, label, value, unit, target, spread)
