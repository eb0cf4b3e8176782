"""Stage *specialise*: what a target wants beyond the graph as it was quantised."""

from __future__ import annotations

import shutil
from pathlib import Path

from export.stages.layout import MODEL_DIR, read_spec, write_spec


def specialise(quantised: Path, folder: Path) -> None:
    """Take the quantised model over as it is.

    Args:
        quantised: outputs of stage *quantise*, or of *fuse* for fp32.
        folder: receives ``model/`` and ``spec.json``.
    """
    shutil.copytree(quantised / MODEL_DIR, folder / MODEL_DIR)
    write_spec(folder, read_spec(quantised))
