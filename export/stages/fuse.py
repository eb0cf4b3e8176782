"""Stage *fuse*: the fused fp32 graph, held against what transformers answered."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from onnx import ModelProto

from edge_agent.contract.manifest import ModelSpec
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.graphs.fusions import fuse_projections
from export.graphs.graph import build_fp32, graph_shape, save_graph
from export.pipeline import Progress
from export.proof.measure import THREADS
from export.proof.parity import prove_parity
from export.proof.recording import load_recording
from export.stages.layout import DECODER, PARITY_NAME, write_spec


def fuse(checkpoint: Checkpoint, recording: Path, context_tokens: int, folder: Path, progress: Progress) -> None:
    """Build the fp32 graph and refuse it where it is not the model.

    Args:
        checkpoint: a checked checkpoint.
        recording: outputs of stage *reference*.
        context_tokens: longest text.
        folder: receives ``model/decoder.onnx``, ``spec.json`` and ``parity.json``.
        progress: is told the largest difference.

    Raises:
        PermanentError: ``export.parity_failed`` or what the graph builder raises.
    """
    model = build_fp32(checkpoint, context_tokens)
    fuse_projections(model)
    save_graph(model, folder / DECODER)
    spec = fp32_spec(checkpoint, model, context_tokens)
    write_spec(folder, spec)
    del model  # gigabytes, and the comparison below loads the graph from disk
    parity = prove_parity(load_recording(recording), folder / DECODER, spec, threads=THREADS)
    progress.line(
        f"fp32 graph: logits within {parity.max_abs_diff:.2e} of transformers at {parity.positions} positions"
    )
    parity.require()
    (folder / PARITY_NAME).write_text(json.dumps(asdict(parity)) + "\n", "utf-8")


def fp32_spec(checkpoint: Checkpoint, model: ModelProto, context_tokens: int) -> ModelSpec:
    """How the engine must feed the fused graph.

    Args:
        checkpoint: where it came from.
        model: the graph.
        context_tokens: longest text.
    """
    shape = graph_shape(model)
    return ModelSpec(
        decoder=DECODER,
        tokenizer=TOKENIZER_NAME,
        architecture=checkpoint.architecture,
        precision="fp32",
        vocab_size=checkpoint.vocab_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_context_tokens=context_tokens,
        bos_token_id=checkpoint.bos_token_id,
        eos_token_id=checkpoint.eos_token_id,
    )
