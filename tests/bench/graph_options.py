"""What each option of the engine's graph is worth: speed, memory and size, side by side on one checkpoint.

    python -m tests.bench.graph_options --shape smollm2-135m            # prints the table
    python -m tests.bench.graph_options --shape reference --write       # and puts it into docs/graph.md

Every form of the graph is made of the same INT4 weights and measured in a process of its own; the forms take turns,
so that a slow minute of the machine meets them all. Figures are medians over the turns, ratios are taken turn by turn.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from edge_agent.contract.manifest import Manifest, ModelSpec, Resources, read_manifest
from export.bundle import list_files, write_file, write_manifest
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint, open_checkpoint
from export.graphs.fusions import fuse_projections
from export.graphs.graph import build_fp32, graph_shape, load_graph, save_graph, save_graphs
from export.graphs.int8_kv import measure_kv_scales, quantise_kv
from export.graphs.pruned_head import prune_head
from export.graphs.ragged import add_ragged
from export.graphs.split_head import dynamic_head, split_head
from export.graphs.vocabulary import choose_vocabulary
from export.quantisation.coarse_table import coarsen_table
from export.quantisation.compact import compact_scales
from export.quantisation.int8_rows import quantise_rows
from export.quantisation.matrices import stored_matrices
from export.quantisation.quantize import QuantSettings, quantize_int4
from export.tasks import open_tasks
from export.texts import TaskTexts
from tests.bench.cache import ROOT, cached, files_digest, versions_of
from tests.bench.graph_passes import HELDOUT, OPTIONS_OF_A_CHOICE, TASK
from tests.bench.made import REFERENCE, python_module, synthetic_checkpoint
from tests.bench.measured_run import run_measured

PAGE = ROOT / "docs" / "graph.md"
CONTEXT = 1024
Ids = npt.NDArray[np.int32]


def _int4(model: ModelProto) -> ModelProto:
    return quantize_int4(model, QuantSettings("rtn", 32))


def _int8_rows(model: ModelProto) -> ModelProto:
    quantise_rows(model)
    return _int4(model)


def _int8_blocks(model: ModelProto) -> ModelProto:
    projections = tuple(matrix.node for matrix in stored_matrices(model) if not matrix.is_head)
    return quantize_int4(model, QuantSettings("rtn", 32, int8_nodes=projections))


@dataclass(frozen=True)
class Form:
    """One form of the graph.

    Args:
        name: in the table.
        fused: projections side by side.
        quantise: from the fp32 graph to the one that is changed further.
        changes: what else is done to the INT4 graph, in order; gets the graph and the material of the checkpoint.
        split: head in a graph of its own.
        skip_head: passes are measured without the head's.
        spec: what the manifest says of it.
        decides: whether the engine can run it.
    """

    name: str
    fused: bool = True
    quantise: Callable[[ModelProto], ModelProto] = _int4
    changes: tuple[Callable[[ModelProto, Material], None], ...] = ()
    split: bool = False
    skip_head: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    decides: bool = True


@dataclass(frozen=True)
class Material:
    """What the forms are made from.

    Args:
        kept: token ids of the pruned head.
        texts: token ids of whole task texts.
    """

    kept: Ids
    texts: list[list[int]]


_HEAD_IDS = {"head_ids": "model/head_ids.bin"}
_SPLIT = {"head": "model/head.onnx"}
FORMS = (
    Form("plain: head attached, gate and up apart", fused=False),
    Form("gate and up fused (the default)"),
    Form("+ `query_seqlens`", changes=(lambda model, _: add_ragged(model),), spec={"ragged": True}),
    Form("+ head apart", split=True, spec=_SPLIT),
    Form("+ head apart, passes without it", split=True, skip_head=True, spec=_SPLIT, decides=False),
    Form(
        f"+ dynamic head, {OPTIONS_OF_A_CHOICE} candidates",
        changes=(lambda model, _: dynamic_head(model),),
        decides=False,
    ),
    Form(
        "+ int8 KV",
        changes=(lambda model, made: quantise_kv(model, measure_kv_scales(model, made.texts)),),
        spec={"kv_dtype": "int8"},
    ),
    Form("+ pruned head", changes=(lambda model, made: prune_head(model, made.kept),), spec=_HEAD_IDS),
    Form(
        "+ pruned head, other rows of the table in 2 bits",
        changes=(lambda model, made: coarsen_table(model, made.kept),),
        spec=_HEAD_IDS,
    ),
    Form("+ projections in eight bits, by rows", quantise=_int8_rows),
    Form("+ projections in eight bits, by blocks of 32", quantise=_int8_blocks),
)


def make_forms(checkpoint: Checkpoint, rows: int, folder: Path, forms: Sequence[Form] = FORMS) -> dict[str, Path]:
    """Build a bundle of every form.

    Args:
        checkpoint: a checked checkpoint.
        rows: tokens of the pruned head.
        folder: receives one folder a form.
        forms: which.

    Returns:
        name of the form -> its bundle.
    """
    made = _material(checkpoint, rows)
    fp32 = folder / "fp32.onnx"
    save_graph(build_fp32(checkpoint, min(CONTEXT, checkpoint.max_positions)), fp32)
    bundles = {}
    for number, form in enumerate(forms):
        model = load_graph(fp32)
        if form.fused:
            fuse_projections(model)
        model = form.quantise(model)
        for change in form.changes:
            change(model, made)
        compact_scales(model)
        bundles[form.name] = _bundle(checkpoint, form, model, made, folder / f"form-{number}")
    for file in folder.glob("fp32.onnx*"):
        file.unlink()
    return bundles


def _material(checkpoint: Checkpoint, rows: int) -> Material:
    tasks = open_tasks([REFERENCE / "task"], CONTEXT)
    vocabulary = choose_vocabulary(checkpoint, [HELDOUT], tasks, rows)
    # Random weights come with a tokenizer that has learnt few words: speed wants the number of rows all the same.
    others = np.setdiff1d(np.arange(checkpoint.vocab_size, dtype=np.int32), vocabulary.ids)
    kept = np.concatenate([vocabulary.ids, others[: max(0, rows - len(vocabulary.ids))]])
    texts = TaskTexts(checkpoint, tasks).golden(24)
    return Material(kept, [[*prompt, *answer] for prompt, answer in texts])


def _bundle(checkpoint: Checkpoint, form: Form, model: ModelProto, made: Material, folder: Path) -> Path:
    shape = graph_shape(model)
    files = {folder / "model/decoder.onnx": model}
    if form.split:
        files[folder / "model/decoder.onnx"], files[folder / "model/head.onnx"] = split_head(model)
    save_graphs(files)
    if "head_ids" in form.spec:
        write_file(folder, form.spec["head_ids"], made.kept.astype("<i4").tobytes())
    write_file(folder, TOKENIZER_NAME, (checkpoint.path / TOKENIZER_NAME).read_bytes())
    write_file(folder, f"tasks/{TASK}/task.yaml", (REFERENCE / "task/task.yaml").read_bytes())
    spec = ModelSpec(
        decoder="model/decoder.onnx",
        tokenizer=TOKENIZER_NAME,
        architecture=checkpoint.architecture,
        precision="int4",
        vocab_size=checkpoint.vocab_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_context_tokens=min(CONTEXT, checkpoint.max_positions),
        bos_token_id=checkpoint.bos_token_id,
        eos_token_id=checkpoint.eos_token_id,
        **form.spec,
    )
    manifest = Manifest(
        name="form",
        version="1",
        target="cpu-x86_64",
        model=spec,
        tasks=(TASK,),
        files=list_files(folder),
        resources=Resources(disk_bytes=0, ram_bytes=0),
    )
    write_manifest(folder, manifest)
    return folder


def take_turns(
    bundles: Mapping[str, Path], rounds: int, events: int, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Measure every form once a round, each in a process of its own.

    Args:
        bundles: of `make_forms`.
        rounds: how often.
        events: held-out events that are decided.
        threads: intra-op threads.

    Returns:
        name of the form -> its figures of each round.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in bundles}
    for _ in range(rounds):
        for form in FORMS:
            arguments = ["--events", str(events if form.decides else 0), "--threads", str(threads)]
            arguments += ["--skip-head"] * form.skip_head
            command = python_module("tests.bench.graph_passes", bundles[form.name], *arguments)
            run = run_measured(command, cwd=ROOT, timeout_s=600.0)
            found[form.name].append(json.loads(run.stdout.strip().splitlines()[-1]))
    return found


def table(bundles: Mapping[str, Path], found: Mapping[str, Sequence[Mapping[str, float]]], *, trained: bool) -> str:
    """The figures as a Markdown table; ratios are to the default form, turn by turn.

    Args:
        bundles: of `make_forms`.
        found: of `take_turns`.
        trained: whether answers mean anything, so that right ones are worth counting.
    """
    default = found[FORMS[1].name]
    lines = [
        "| form | model files | decode tok/s | | prefill tok/s | | decisions/s | | peak RSS |" + " right |" * trained,
        "|---|---|---|---|---|---|---|---|---|" + "---|" * trained,
    ]
    for name, rounds in found.items():
        size = sum(entry.size for entry in read_manifest(bundles[name])[0].files if entry.path.startswith("model/"))
        cells = [name, f"{size / 1e6:.2f} MB"]
        for figure, digits in (("decode_tok_per_s", 0), ("prefill_tok_per_s", 0), ("decisions_per_s", 1)):
            cells += _cells(rounds, default, figure, digits)
        cells.append(f"{median(r['peak_rss_bytes'] for r in rounds) / 1e6:.0f} MB")
        if trained:
            cells.append(f"{rounds[0]['right']:.1%}" if "right" in rounds[0] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(
    rounds: Sequence[Mapping[str, float]], default: Sequence[Mapping[str, float]], figure: str, digits: int
) -> list[str]:
    if figure not in rounds[0]:
        return ["", ""]
    ratio = median(mine[figure] / theirs[figure] for mine, theirs in zip(rounds, default, strict=True))
    return [f"{median(r[figure] for r in rounds):.{digits}f}", f"{ratio:.2f}x"]


def write_table(shape: str, text: str, page: Path = PAGE) -> None:
    """Put a table into the page, between the marks of its shape."""
    begin, end = f"<!-- measured: {shape} -->\n", "<!-- end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    page.write_text(pattern.sub(lambda _: begin + text + end, page.read_text("utf-8")), "utf-8")


def bundles_of(shape: str, rows: int, forms: Sequence[Form] = FORMS) -> dict[str, Path]:
    """The forms of a shape, made once for each state of the exporter."""
    folder = REFERENCE / "checkpoint" if shape == "reference" else synthetic_checkpoint(shape)
    key = {
        "checkpoint": files_digest(folder),
        "rows": rows,
        "forms": [form.name for form in forms],
        "export": files_digest(*sorted((ROOT / "export").rglob("*.py"))),
        "bench": files_digest(Path(__file__)),
        "versions": versions_of("onnxruntime", "mobius-onnx"),
    }

    def make(place: Path) -> None:
        bundles = make_forms(open_checkpoint(folder), rows, place, forms)
        names = {name: bundle.name for name, bundle in bundles.items()}
        (place / "forms.json").write_text(json.dumps(names), "utf-8")

    place = cached(f"graph-{'options' if forms == FORMS else 'precisions'}-{shape}", key, make)
    return {name: place / lies for name, lies in json.loads((place / "forms.json").read_text("utf-8")).items()}


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.graph_options")
    parser.add_argument("--shape", default="smollm2-135m", help="a published shape, or `reference`")
    parser.add_argument("--rows", type=int, help="tokens of the pruned head (default 8192; reference: 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table into docs/graph.md")
    arguments = parser.parse_args(argv)
    trained = arguments.shape == "reference"
    bundles = bundles_of(arguments.shape, arguments.rows or (1024 if trained else 8192))
    found = take_turns(bundles, arguments.rounds, 1000 if trained else 40, arguments.threads)
    text = table(bundles, found, trained=trained)
    print(text)
    if arguments.write:
        write_table(arguments.shape, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
