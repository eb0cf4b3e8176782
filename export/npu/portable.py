"""From weights to the portable fp32 graph: standard operators only, no fusion, every shape symbolic.

This graph has two uses: an opinion on parity that shares no code with the fused graph's builder, and the source of
graphs for accelerators, whose compilers read standard operators only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before the library is imported: with a local checkpoint nothing is to be asked of a model registry.
os.environ["HF_HUB_OFFLINE"] = "1"

import onnx
import torch
from onnx import ModelProto
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.model_configs import Gemma3TextOnnxConfig

from edge_agent.errors import PermanentError
from export.checkpoint.model import load_model
from export.checkpoint.source import Checkpoint
from export.graphs.graph import save_graph

PORTABLE_NAME = "portable.onnx"
_TASK = "text-generation-with-past"
_CHATTY = ("optimum", "transformers", "torch.onnx")


def export_portable(checkpoint: Checkpoint, folder: Path) -> Path:
    """Export a checkpoint to standard ONNX operators.

    Attention is exported in its eager form: the fused form is traced with a guard against rows that see nothing
    (IsNaN and Where after the softmax), which no accelerator's compiler takes.

    Args:
        checkpoint: a checked checkpoint.
        folder: receives ``portable.onnx`` (with ``portable.onnx.data`` beside it where it is large).

    Returns:
        The graph's path. Inputs ``input_ids``, ``position_ids`` int64 [batch, seq], ``attention_mask`` int64
        [batch, past + seq], ``past_key_values.N.key|value`` float32 [batch, kv_heads, past, head_dim]; outputs
        ``logits`` float32 [batch, seq, vocab], ``present.N.key|value`` float32 [batch, kv_heads, past + seq, head_dim].

    Raises:
        PermanentError: ``export.reference_failed`` when transformers cannot load the checkpoint,
            ``export.portable_failed`` when optimum cannot export it.
    """
    with tempfile.TemporaryDirectory(prefix=".portable-", dir=folder) as scratch:
        _export(checkpoint, Path(scratch))
        model = onnx.load(Path(scratch) / "model.onnx")
    _strip_names_of_this_machine(model)
    return save_graph(model, folder / PORTABLE_NAME)[0]


class _GemmaWithPositions(Gemma3TextOnnxConfig):
    """optimum lets Gemma count its positions by the past's length; a fixed past window has always the same length."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """The library's inputs and the positions."""
        return {**super().inputs, "position_ids": {0: "batch_size", 1: "sequence_length"}}


def _export(checkpoint: Checkpoint, scratch: Path) -> None:
    with _silence():
        model = load_model(checkpoint)
        try:
            own = {}
            if checkpoint.architecture == "gemma3_text":
                own["model"] = _GemmaWithPositions(
                    model.config, task="text-generation", use_past=True, use_past_in_inputs=True
                )
            onnx_export_from_model(
                model, scratch, task=_TASK, do_validation=False, preprocessors=None, custom_onnx_configs=own or None
            )
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            NotImplementedError,
            torch.onnx.OnnxExporterError,
        ) as error:
            raise PermanentError("export.portable_failed", f"optimum cannot export the checkpoint: {error}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep advice to authors of models (tracer warnings, progress) from a user who can do nothing about it."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _strip_names_of_this_machine(model: ModelProto) -> None:
    """Drop what would make two equal builds differ, and what no runtime reads."""
    model.graph.name = "decoder"
    model.graph.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
