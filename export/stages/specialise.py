"""Stage *specialise*: what a target, a domain or the engine wants beyond the graph as it was quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto

from export.boards import Board
from export.checkpoint.peft import LoraAdapter
from export.checkpoint.source import Checkpoint
from export.graphs.alternatives import add_alternatives
from export.graphs.chosen_scores import score_chosen_positions
from export.graphs.graph import load_graph, save_graph, save_graphs
from export.graphs.half import check_headroom, peak_activations, to_half
from export.graphs.int8_kv import measure_kv_scales, quantise_kv
from export.graphs.low_rank import add_branches
from export.graphs.pruned_head import prune_head
from export.graphs.ragged import add_ragged
from export.graphs.split_head import split_head
from export.graphs.vocabulary import choose_vocabulary, reach
from export.pipeline import Progress
from export.quantisation.coarse_table import coarsen_table
from export.quantisation.compact import compact_scales
from export.request import GraphOptions
from export.stages.adapt import take_adapters
from export.stages.layout import DECODER, HEAD, HEAD_IDS, MODEL_DIR, VOCABULARY_NAME, read_spec, write_spec
from export.tasks import TaskFolder
from export.texts import TaskTexts

ACTIVATION_TEXTS = 64
"""Texts a task on which the reach of activations is measured: it settles after a few dozen."""


@dataclass(frozen=True)
class Speciality:
    """What the stage works from.

    Args:
        board: the target.
        options: what was asked of the graph.
        checkpoint: where the weights came from.
        tasks: the bundle's tasks.
        texts: theirs, to measure activations on.
        adapters: by task.
    """

    board: Board
    options: GraphOptions
    checkpoint: Checkpoint
    tasks: tuple[TaskFolder, ...]
    texts: TaskTexts
    adapters: Mapping[str, LoraAdapter] = field(default_factory=dict)


def specialise(
    speciality: Speciality, shipped: Path, folder: Path, progress: Progress, adapted: Path | None = None
) -> None:
    """Rewrite the graph for those who will run it.

    Args:
        speciality: target, options, tasks.
        shipped: outputs of stage *quantise*, or of *fuse* for fp32.
        folder: receives ``model/`` and ``spec.json``.
        progress: is told what was changed.
        adapted: outputs of stage *adapt*, where tasks have adapters.

    Raises:
        EdgeError: ``export.vocab_*``, ``export.calibration_missing``, ``tokenizer.no_bytes``,
            ``export.graph_unexpected``.
    """
    (folder / MODEL_DIR).mkdir()
    changes: dict[str, Any] = {}
    model = load_graph(shipped / DECODER)
    if adapted is not None:
        # After the weights were rounded: an adapter was trained beside them, and its own numbers stay as they are.
        add_branches(model, speciality.adapters)
        changes |= take_adapters(adapted, folder)
    if speciality.options.vocabulary:
        changes |= _prune(speciality, model, folder, progress)
    if speciality.options.kv == "int8":
        prompts = speciality.texts.calibration(ACTIVATION_TEXTS)
        quantise_kv(model, measure_kv_scales(model, prompts))
        changes["kv_dtype"] = "int8"
    half = speciality.board.activations == "float16"
    if (not half) if speciality.options.together is None else speciality.options.together:
        add_ragged(model)
        score_chosen_positions(model)
        changes |= {"ragged": True, "score_at": True, **({"alternatives": True} if add_alternatives(model) else {})}
    if half:
        # Before the head is cut off: its scores may overflow as well.
        _check_range(speciality, model, progress)
        changes["kv_dtype"] = "float16"
    graphs: dict[Path, ModelProto] = {folder / DECODER: model}
    if speciality.options.head == "split":
        graphs[folder / DECODER], graphs[folder / HEAD] = split_head(model)
        changes["head"] = HEAD
    for graph in graphs.values():
        if half:
            to_half(graph)
        else:
            compact_scales(graph)
    files = save_graphs(graphs) if len(graphs) > 1 else save_graph(model, folder / DECODER)
    spec = read_spec(shipped)
    write_spec(folder, replace(spec, **changes))
    progress.line(f"{spec.precision} for {speciality.board.name}: {sum(file.stat().st_size for file in files):,} bytes")


def _prune(speciality: Speciality, model: ModelProto, folder: Path, progress: Progress) -> dict[str, Any]:
    """Prune the head, and write which tokens it kept and what they can write."""
    options, checkpoint = speciality.options, speciality.checkpoint
    vocabulary = choose_vocabulary(checkpoint, options.vocabulary, speciality.tasks, options.vocab_rows)
    if options.rare_rows == "int2":
        coarsen_table(model, vocabulary.ids)
    else:
        prune_head(model, vocabulary.ids)
    (folder / HEAD_IDS).write_bytes(vocabulary.to_bytes())
    facts: dict[str, Any] = {**vocabulary.as_dict(), "rare_rows": options.rare_rows}
    line = f"head: {len(vocabulary.ids):,} of {checkpoint.vocab_size:,} tokens"
    if options.vocab_heldout:
        found = reach(checkpoint, vocabulary, options.vocab_heldout)
        facts["heldout"] = found.as_dict()
        line += f", which reach {found.reachable / found.tokens:.2%} of the held-out text's"
    (folder / VOCABULARY_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
    progress.line(line)
    return {"head_ids": HEAD_IDS}


def _check_range(speciality: Speciality, model: ModelProto, progress: Progress) -> None:
    """Refuse float16 activations where the task's own texts leave no room for them."""
    texts = speciality.texts.calibration(ACTIVATION_TEXTS)
    peak = check_headroom(peak_activations(model, texts))
    progress.line(f"float16: the largest activation on {len(texts)} texts is {peak:,.0f} of 65,504")


def vocabulary_facts(special: Path) -> dict[str, Any] | None:
    """What the pruned head kept, for the report card; None for a whole head."""
    file = special / VOCABULARY_NAME
    facts: dict[str, Any] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return facts
