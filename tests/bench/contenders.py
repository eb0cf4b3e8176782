"""Of one shape: our bundles and the peers' files, made from the same weights, and the commands that run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.bench.attempts import Missing, Say, attempt
from tests.bench.interleaved import Command
from tests.bench.llama_cpp_peer import llama_cpp_python
from tests.bench.made import (
    HELDOUT,
    HERE,
    Built,
    GgufPeer,
    build_bundle,
    gguf_peer,
    llama_cpp_sizes,
    optimum_peer,
    python_module,
    synthetic_checkpoint,
    vocabulary_text,
)

PRUNED_ROWS = 8192
OURS, OURS_PRUNED, OPTIMUM, LLAMA_CPP = "ours", "ours, 8k-row head", "optimum", "llama.cpp"


@dataclass(frozen=True)
class Contenders:
    """Everything that is compared.

    Args:
        gguf: llama.cpp's file.
        llama_cpp: interpreter that can run it.
        quantised_by_llama_cpp: sizes of what llama.cpp's own quantiser makes, ``pure`` and ``default_mix``.
        optimum: folder of optimum's graph.
        built: our bundle, with the exporter's defaults.
        pruned: our bundle with a head of `PRUNED_ROWS` rows, the table's other rows in two bits, blocks of 128.
    """

    gguf: GgufPeer
    llama_cpp: Path | Missing
    quantised_by_llama_cpp: dict[str, int] | Missing
    optimum: Path | Missing
    built: Built | Missing
    pruned: Built | Missing


def make_contenders(shape: str, say: Say, *, with_llama_cpp: bool) -> Contenders:
    """Make everything, or find it in the cache; only our own bundles are built anew each time.

    Args:
        shape: as `export.checkpoint.synth` names it.
        say: is told what happens.
        with_llama_cpp: whether llama.cpp itself is compiled.
    """
    say(f"{shape}: checkpoint")
    checkpoint = synthetic_checkpoint(shape)
    say(f"{shape}: the peers' files")
    gguf = gguf_peer(shape, checkpoint)
    optimum = attempt(lambda: optimum_peer(shape, checkpoint), say)
    llama_cpp: Path | Missing = Missing("left out")
    if with_llama_cpp:
        say("llama.cpp (compiled once, some minutes)")
        llama_cpp = attempt(llama_cpp_python, say)
    sizes: dict[str, int] | Missing = Missing("without llama.cpp")
    if isinstance(llama_cpp, Path):
        python = llama_cpp
        sizes = attempt(lambda: llama_cpp_sizes(shape, checkpoint, python), say)
    say(f"{shape}: edge-export build")
    built = attempt(lambda: build_bundle(checkpoint, shape), say)
    say(f"{shape}: edge-export build, {PRUNED_ROWS}-row head")
    texts = [HELDOUT, vocabulary_text(shape, checkpoint)]
    rows: list[str | Path] = ["--vocab-from", *texts, "--vocab-rows", str(PRUNED_ROWS)]
    # The head's rows are the table's own, so a pruned head alone saves nothing in the file: what shrinks it is that the
    # rest of the table is stored coarsely, and fewer scales.
    rows += ["--rare-rows", "int2", "--block-size", "128"]
    pruned = attempt(lambda: build_bundle(checkpoint, f"{shape}-head-8k", rows), say)
    return Contenders(gguf, llama_cpp, sizes, optimum, built, pruned)


def decode_commands(contenders: Contenders, options: list[str]) -> dict[str, Command]:
    """A command for every engine that could be made, each taking the same options."""
    commands: dict[str, Command] = {}
    for name, bundle in ((OURS, contenders.built), (OURS_PRUNED, contenders.pruned)):
        if isinstance(bundle, Built):
            commands[name] = python_module("tests.bench.decode_passes", "fused", bundle.bundle, *options)
    if isinstance(contenders.optimum, Path):
        commands[OPTIMUM] = python_module("tests.bench.decode_passes", "optimum", contenders.optimum, *options)
    if isinstance(contenders.llama_cpp, Path):
        program = HERE / "llama_cpp_passes.py"
        commands[LLAMA_CPP] = [contenders.llama_cpp, program, contenders.gguf.path, *options]
    return commands
