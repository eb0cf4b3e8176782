"""Where the committed reference checkpoint lies."""

from pathlib import Path

CHECKPOINT = Path(__file__).parents[3] / "export" / "reference" / "checkpoint"
