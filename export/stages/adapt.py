"""Stage *adapt*: a place in the fp32 graph for every task's adapter, held against transformers with merged weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save_file

from edge_agent.errors import RefusedError
from edge_agent.runtime.adapter import task_adapter
from export.checkpoint.peft import LoraAdapter, open_adapter
from export.checkpoint.source import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, TOKENIZER_NAME, Checkpoint, open_checkpoint
from export.graphs.graph import load_graph, save_graph
from export.graphs.low_rank import add_branches, packed_matrices
from export.pipeline import Progress
from export.proof.greedy import StepModel
from export.proof.measure import THREADS
from export.proof.parity import against_recording
from export.proof.recording import observe
from export.stages.layout import DECODER, link_or_copy, read_spec, write_spec
from export.tasks import TaskFolder

ADAPTER_NAME = "adapter.safetensors"
FACTS_NAME = "adapters.json"


def adapt(
    checkpoint: Checkpoint, adapters: Mapping[str, LoraAdapter], fused: Path, folder: Path, progress: Progress
) -> None:
    """Add the branches, write each task's matrices, and refuse an adapter that does not answer as PEFT would.

    Args:
        checkpoint: the base.
        adapters: by task.
        fused: outputs of stage *fuse*.
        folder: receives ``model/decoder.onnx``, ``spec.json``, ``adapters.json`` and
            ``tasks/<task>/adapter.safetensors``.
        progress: is told the largest difference of each.

    Raises:
        PermanentError: ``export.parity_failed``, ``export.reference_failed`` or ``export.graph_unexpected``.
    """
    model = load_graph(fused / DECODER)
    branches = add_branches(model, adapters)
    save_graph(model, folder / DECODER)
    del model  # gigabytes, and the comparison below loads the graph from disk
    files = {task: f"tasks/{task}/{ADAPTER_NAME}" for task in adapters}
    for task, file in files.items():
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_bytes(save_arrays(packed_matrices(branches, adapters[task])))
    names = tuple(branch.name for branch in branches)
    spec = replace(read_spec(fused), adapter_inputs=names, adapters=files)
    write_spec(folder, spec)
    facts = {task: adapter.as_facts() for task, adapter in adapters.items()}
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
    for task, adapter in adapters.items():
        with merged(checkpoint, adapter, folder.parent) as whole:
            recording = observe(whole)
        steps = StepModel(folder / DECODER, spec, THREADS, task_adapter(folder, spec, task))
        parity = against_recording(recording, steps)
        progress.line(
            f"adapter of {task}: logits within {parity.max_abs_diff:.2e} of transformers with merged weights "
            f"at {parity.positions} positions"
        )
        parity.require()


@contextmanager
def merged(checkpoint: Checkpoint, adapter: LoraAdapter, scratch: Path) -> Iterator[Checkpoint]:
    """The checkpoint with an adapter's products added to its weights, for as long as the block lasts.

    Args:
        checkpoint: the base.
        adapter: of this base.
        scratch: folder on a disk with room for the changed weight files in fp32.
    """
    with TemporaryDirectory(dir=scratch, prefix=".merged-", suffix=".partial") as place:
        for name in (CONFIG_NAME, TOKENIZER_NAME):
            shutil.copyfile(checkpoint.path / name, Path(place) / name)
        index = checkpoint.path / INDEX_NAME
        if index.is_file() and (checkpoint.path / SINGLE_NAME) not in checkpoint.weight_files:
            shutil.copyfile(index, Path(place) / INDEX_NAME)
        for file in checkpoint.weight_files:
            weights = load_file(file)
            changed = weights.keys() & adapter.updates.keys()
            if not changed:
                link_or_copy(file, Path(place) / file.name)
                continue
            for name in changed:
                update = adapter.updates[name]
                weights[name] = weights[name].to(torch.float32) + update.up @ update.down
            save_file(weights, os.fspath(Path(place) / file.name), metadata={"format": "pt"})
        yield open_checkpoint(Path(place), allow_large=True)


def take_adapters(adapted: Path, folder: Path) -> dict[str, Any]:
    """Take every task's matrices over into a later stage; returns what its ``spec.json`` says of them."""
    spec = read_spec(adapted)
    for file in (spec.adapters or {}).values():
        link_or_copy(adapted / file, folder / file)
    return {"adapter_inputs": spec.adapter_inputs, "adapters": spec.adapters}


def adapter_facts(adapted: Path) -> dict[str, Any]:
    """``{"adapters": …}`` for the report card."""
    return {"adapters": json.loads((adapted / FACTS_NAME).read_text("utf-8"))}


def open_adapters(
    folders: Mapping[str, Path], tasks: Sequence[TaskFolder], checkpoint: Checkpoint
) -> dict[str, LoraAdapter]:
    """Read every adapter of a request.

    Args:
        folders: PEFT's, by task.
        tasks: the bundle's tasks.
        checkpoint: the base.

    Raises:
        RefusedError: ``export.task_unknown``, ``adapter.unsupported``.
        PermanentError: ``adapter.invalid``.
    """
    known = {task.spec.name for task in tasks}
    for name in folders:
        if name not in known:
            raise RefusedError("export.task_unknown", f"no task {name!r} among: {', '.join(sorted(known))}")
    return {task: open_adapter(folder, checkpoint) for task, folder in sorted(folders.items())}
