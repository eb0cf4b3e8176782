"""Stages *reference* and *portable*: what the original answers, and its graph before anything of it is changed."""

from __future__ import annotations

from pathlib import Path

from export.checkpoint.source import Checkpoint
from export.npu.portable import export_portable
from export.proof.recording import record_reference


def reference(checkpoint: Checkpoint, folder: Path) -> None:
    """Record transformers.

    Args:
        checkpoint: a checked checkpoint.
        folder: receives the recording.

    Raises:
        PermanentError: ``export.reference_failed``.
    """
    record_reference(checkpoint, folder)


def portable_graph(checkpoint: Checkpoint, folder: Path) -> None:
    """Export the graph that accelerators' graphs are made from.

    Args:
        checkpoint: a checked checkpoint.
        folder: receives ``portable.onnx``.

    Raises:
        PermanentError: ``export.reference_failed`` or ``export.portable_failed``.
    """
    export_portable(checkpoint, folder)
