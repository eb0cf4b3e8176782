"""What low-rank branches cost: a task that adds nothing, and a task with an adapter, beside the graph without branches.

    python -m tests.bench.adapter_cost --shape smollm2-135m --rounds 7

Every bundle is made of the same INT4 weights and measured in a process of its own; they take turns. Ratios are to the
graph without branches, round by round, and the median of them is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from safetensors.numpy import save as save_arrays

from edge_agent.contract.document import read_document, to_document
from edge_agent.contract.manifest import Manifest, Resources
from export.bundle import list_files, write_file, write_manifest
from export.checkpoint.peft import LoraAdapter, open_adapter
from export.checkpoint.source import TOKENIZER_NAME, open_checkpoint
from export.graphs.fusions import fuse_projections
from export.graphs.graph import build_fp32, load_graph, save_graph
from export.graphs.low_rank import add_branches, packed_matrices
from export.quantisation.compact import compact_scales
from export.quantisation.quantize import QuantSettings, quantize_int4
from export.stages.fuse import fp32_spec
from export.stages.layout import DECODER
from tests.bench.cache import ROOT, cached, files_digest, versions_of
from tests.bench.interleaved import paired_ratios, take_turns
from tests.bench.made import REFERENCE, python_module, synthetic_checkpoint
from tests.export.adapters import MODULES, make_adapter

CONTEXT = 1024
RANK = 16
EXPERT, PLAIN = "expert", "plain"
TARGETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "query and value": ("q_proj", "v_proj"),
    "all seven": MODULES,
}
"""Projections that the bundle's adapter changes."""


def make_bundles(source: Path, folder: Path) -> None:
    """One bundle for each of `TARGETS`, with a task that has the adapter and one that has none.

    Args:
        source: a checkpoint.
        folder: receives one folder a bundle.
    """
    checkpoint = open_checkpoint(source)
    model = build_fp32(checkpoint, CONTEXT)
    fuse_projections(model)
    spec = fp32_spec(checkpoint, model, CONTEXT)
    model = quantize_int4(model, QuantSettings("rtn", 32))
    compact_scales(model)
    save_graph(model, folder / "int4.onnx")
    del model
    for number, modules in enumerate(TARGETS.values()):
        bundle = folder / str(number)
        graph = load_graph(folder / "int4.onnx")
        branches: dict[str, object] = {}
        if modules:
            place = make_adapter(folder / f"adapter-{number}", source, modules=modules, r=RANK)
            adapters: dict[str, LoraAdapter] = {EXPERT: open_adapter(place, checkpoint)}
            added = add_branches(graph, adapters)
            file = f"tasks/{EXPERT}/adapter.safetensors"
            write_file(bundle, file, save_arrays(packed_matrices(added, adapters[EXPERT])))
            branches = {"adapter_inputs": [branch.name for branch in added], "adapters": {EXPERT: file}}
        save_graph(graph, bundle / DECODER)
        write_file(bundle, TOKENIZER_NAME, (source / TOKENIZER_NAME).read_bytes())
        for task in (EXPERT, PLAIN):
            write_file(bundle, f"tasks/{task}/task.yaml", (REFERENCE / "task/task.yaml").read_bytes())
        manifest = read_document(
            Manifest,
            {
                "name": "cost",
                "version": "1",
                "target": "cpu-x86_64",
                "model": {**to_document(spec, exclude_none=True), **branches},
                "tasks": (EXPERT, PLAIN),
                "files": list_files(bundle),
                "resources": Resources(disk_bytes=0, ram_bytes=0),
            },
        )
        write_manifest(bundle, manifest)


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.adapter_cost")
    parser.add_argument("--shape", default="smollm2-135m", help="a published shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=256)
    parser.add_argument("--cpu-time", action="store_true", help="for machines with other work; with --threads 1")
    arguments = parser.parse_args(argv)
    source = synthetic_checkpoint(arguments.shape)
    key = {
        "checkpoint": files_digest(source),
        "export": files_digest(*sorted((ROOT / "export").rglob("*.py"))),
        "bench": files_digest(Path(__file__)),
        "versions": versions_of("onnxruntime", "mobius-onnx"),
    }
    place = cached(f"adapter-cost-{arguments.shape}", key, lambda folder: make_bundles(source, folder))
    options = ["--depths", str(arguments.depth), "--threads", str(arguments.threads)]
    options += ["--cpu-time"] * arguments.cpu_time
    engines = {
        f"{target}, rank {rank}": python_module(
            "tests.bench.decode_passes", "fused", place / str(number), *options, "--task", task
        )
        for number, target in enumerate(TARGETS)
        for task, rank in ((PLAIN, 0), (EXPERT, RANK))
        if number or task == PLAIN
    }
    found = take_turns(engines, arguments.rounds, ROOT)
    base = found[next(iter(engines))]
    print(
        "| projections with a branch, rank | decode tok/s | | prefill tok/s | | peak RSS |\n|---|---|---|---|---|---|"
    )
    for name, speeds in found.items():
        cells = [name]
        for mine, theirs in (
            (speeds.decode_tok_per_s, base.decode_tok_per_s),
            (speeds.prefill_tok_per_s, base.prefill_tok_per_s),
        ):
            depth = arguments.depth
            ratio = median(paired_ratios(mine[depth], theirs[depth]))
            cells += [f"{median(mine[depth]):.0f}", f"{ratio:.2f}x"]
        print("| " + " | ".join([*cells, f"{median(speeds.peak_rss_bytes) / 1e6:.0f} MB"]) + " |")
    print(
        json.dumps({name: {"decode": s.decode_tok_per_s, "prefill": s.prefill_tok_per_s} for name, s in found.items()})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
