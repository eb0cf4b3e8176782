"""How far a build is: a moving line on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from export.pipeline import Progress, StageTiming

STAGES = ("source", "shrink", "reference", "fuse", "sweep", "quantise", "portable", "specialise", "prove", "package")
"""In order; a build may leave some out."""


def best_progress() -> Progress:
    """The bar for a terminal, lines for everything else (a log, a pipe, CI)."""
    return BarProgress(sys.stderr) if sys.stderr.isatty() else LineProgress()


class QuietProgress:
    """Says nothing."""

    def begins(self, stage: str) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def ends(self, timing: StageTiming) -> None:
        """Nothing."""


class LineProgress:
    """One line for what was found, one line with the time for each stage.

    Args:
        stream: where lines go; default: stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def begins(self, stage: str) -> None:
        """Say nothing: a log wants results."""

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def ends(self, timing: StageTiming) -> None:
        """Print what the stage took."""
        self.line(f"[{timing.stage}] {timing_words(timing)}")


class BarProgress:
    """A bar over the stages, with lines scrolling above it.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._stage = self._bar.add_task("", total=len(STAGES))

    def begins(self, stage: str) -> None:
        """Show the stage."""
        self._bar.start()
        self._bar.update(self._stage, description=stage, completed=STAGES.index(stage) if stage in STAGES else 0)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False)

    def ends(self, timing: StageTiming) -> None:
        """Print what the stage took, and take the bar away between stages: an error message follows a clean line."""
        self._bar.stop()
        self._bar.console.print(f"[{timing.stage}] {timing_words(timing)}", markup=False)


def timing_words(timing: StageTiming) -> str:
    """``12.3 s`` or ``as it was (0.1 s)``."""
    return f"as it was ({timing.seconds:.1f} s)" if timing.reused else f"{timing.seconds:.1f} s"
