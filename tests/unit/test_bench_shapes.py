"""Comparisons must be like with like, and a part that cannot be made must not hide the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.manifest import MANIFEST_NAME
from tests.bench.attempts import Missing, attempt
from tests.bench.contenders import LLAMA_CPP, OPTIMUM, OURS, Contenders, decode_commands
from tests.bench.figures import Figure
from tests.bench.interleaved import Speeds
from tests.bench.made import Built, GgufPeer
from tests.bench.measured_run import Run, run_measured
from tests.bench.shape_figures import decode_figures, export_figures, size_figures

SHAPE = "smollm2-135m"
GGUF = GgufPeer(Path("model.gguf"), file_bytes=1100, tensor_bytes=1000, default_mix_bytes=1300)
STAGES = "[source] 3.1 s\nfp32 graph: logits within 1e-5\n[fuse] as it was (0.1 s)\n[quantise] 20.0 s\n"
TAKEN = Run(seconds=61.0, cpu_seconds=80.0, peak_rss_bytes=3 * 10**9, stdout="", stderr=STAGES)


def bundle(folder: Path) -> Built:
    """A bundle by its manifest alone: 900 bytes of graphs, 200 of tokenizer."""
    sizes = {"model/decoder.onnx": 100, "model/decoder.onnx.data": 800, "tokenizer.json": 200, "tasks/t/task.yaml": 50}
    model: dict[str, Any] = {
        "decoder": "model/decoder.onnx",
        "tokenizer": "tokenizer.json",
        "architecture": "llama",
        "precision": "int4-rtn-32",
        "vocab_size": 8,
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_context_tokens": 16,
        "eos_token_id": 0,
    }
    manifest = {
        "name": "bench",
        "version": "0.1.0",
        "target": "cpu-x86_64",
        "model": model,
        "tasks": ["t"],
        "files": [{"path": path, "size": size, "sha256": "0" * 64} for path, size in sizes.items()],
        "resources": {"disk_bytes": 0, "ram_bytes": 0},
    }
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    (folder / "tokenizer.json").write_bytes(bytes(200))
    return Built(folder, TAKEN)


def contenders(built: Built | Missing, **changes: Any) -> Contenders:
    nothing = Missing("left out")
    parts: dict[str, Any] = {"llama_cpp": nothing, "quantised_by_llama_cpp": nothing, "optimum": nothing}
    return Contenders(gguf=GGUF, built=built, pruned=Missing("no such option"), **{**parts, **changes})


def by_key(figures: Any) -> dict[str, Figure]:
    return {figure.key.removeprefix(f"{SHAPE}."): figure for figure in figures}


def speeds(**tok_per_s: list[float]) -> dict[str, Speeds]:
    names = {"ours": OURS, "optimum": OPTIMUM, "llama_cpp": LLAMA_CPP}
    return {
        names[name]: Speeds({64: samples, 256: samples}, {64: samples, 256: samples})
        for name, samples in tok_per_s.items()
    }


def test_a_tokenizer_on_one_side_only_is_not_compared(tmp_path: Path) -> None:
    figures = by_key(size_figures(SHAPE, contenders(bundle(tmp_path / "bundle"))))
    assert figures["size_ratio"].value == 0.9  # 900 of graph beside 1000 of tensors
    assert figures["size_ratio_whole"].value == 1.0  # 1100 with tokenizer.json beside the whole GGUF
    assert figures["size_ratio"].met is True


def test_a_build_that_refuses_an_option_leaves_the_other_sizes(tmp_path: Path) -> None:
    figures = by_key(size_figures(SHAPE, contenders(bundle(tmp_path / "bundle"))))
    assert figures["size_ratio_head_8k"].value is None
    assert figures["size_ratio_head_8k"].note == "no such option"
    assert figures["gguf_pure_mb"].value is not None


def test_a_size_that_llama_cpp_itself_disagrees_with_is_shown(tmp_path: Path) -> None:
    own = {"pure": 1234, "default_mix": 1300}
    figures = by_key(size_figures(SHAPE, contenders(bundle(tmp_path / "bundle"), quantised_by_llama_cpp=own)))
    assert figures["gguf_pure_mb"].note == "llama.cpp's own quantiser makes 1,234 bytes"


def test_the_stages_that_took_the_time_are_named(tmp_path: Path) -> None:
    figures = by_key(export_figures(SHAPE, bundle(tmp_path / "bundle")))
    assert figures["export_seconds"].value == 61.0
    assert figures["export_seconds"].note == "by stage: source 3.1 s, quantise 20.0 s"
    assert figures["export_peak_rss"].value == 3.0


def test_a_build_that_failed_has_met_no_target() -> None:
    figures = by_key(export_figures(SHAPE, Missing("out of memory")))
    assert [figure.met for figure in figures.values()] == [False, False]


def test_a_decode_ratio_pairs_rounds_of_the_same_minute() -> None:
    figures = by_key(decode_figures(SHAPE, speeds(ours=[240.0, 60.0, 230.0], optimum=[100.0, 25.0, 100.0])))
    assert figures["decode_ratio_256"].value == 2.4
    assert figures["decode_ratio_256"].spread == (2.3, 2.4)


def test_without_the_peer_a_ratio_is_missing_and_not_one() -> None:
    figures = by_key(decode_figures(SHAPE, speeds(ours=[240.0])))
    assert figures["decode_ratio_64"].value is None
    assert figures["decode_ratio_64"].met is False


def test_llama_cpp_is_measured_only_where_it_could_be_compiled(tmp_path: Path) -> None:
    built = bundle(tmp_path / "bundle")
    assert set(decode_commands(contenders(built), [])) == {OURS}
    assert set(decode_commands(contenders(built, llama_cpp=Path("python")), [])) == {OURS, LLAMA_CPP}


@pytest.mark.parametrize(
    ("code", "why"),
    [("print('first', file=sys.stderr); sys.exit('last')", "last"), ("sys.exit(4)", "ended with 4:")],
)
def test_what_could_not_be_made_is_told_in_one_line(code: str, why: str, tmp_path: Path) -> None:
    said: list[str] = []
    command = [sys.executable, "-c", f"import sys; {code}"]
    found = attempt(lambda: run_measured(command, cwd=tmp_path), said.append)
    assert isinstance(found, Missing)
    assert found.why.endswith(why)
    assert said == [f"not measured: {found.why}"]


def test_a_compiler_that_is_not_there_is_told_in_its_own_words() -> None:
    def compile_it() -> None:
        raise subprocess.CalledProcessError(1, ["pip"], stderr="building\nerror: no C++ compiler found\n")

    found = attempt(compile_it, lambda line: None)
    assert found == Missing("error: no C++ compiler found")
