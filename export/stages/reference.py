"""Stage *reference*: what the original answers, written down before anything of it is changed."""

from __future__ import annotations

from pathlib import Path

from export.recording import record_reference
from export.source import Checkpoint


def reference(checkpoint: Checkpoint, folder: Path) -> None:
    """Record transformers.

    Args:
        checkpoint: a checked checkpoint.
        folder: receives the recording.

    Raises:
        PermanentError: ``export.reference_failed``.
    """
    record_reference(checkpoint, folder)
