"""Speed of several engines, each run in a fresh process, taking turns: a slow minute of the machine meets them all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.bench.measured_run import run_measured

Command = Sequence[str | Path]


@dataclass
class Speeds:
    """What one engine did, a number a round.

    Args:
        decode_tok_per_s: depth -> median of the passes of each round.
        prefill_tok_per_s: depth -> of each round.
        peak_rss_bytes: of each round.
    """

    decode_tok_per_s: dict[int, list[float]] = field(default_factory=dict)
    prefill_tok_per_s: dict[int, list[float]] = field(default_factory=dict)
    peak_rss_bytes: list[int] = field(default_factory=list)

    def add(self, printed: str) -> None:
        """Take the JSON that a round printed last."""
        parsed = json.loads(printed.strip().splitlines()[-1])
        self.peak_rss_bytes.append(parsed["peak_rss_bytes"])
        for name, times in parsed["depths"].items():
            depth = int(name)
            self.decode_tok_per_s.setdefault(depth, []).append(1000 / median(times["step_ms"]))
            self.prefill_tok_per_s.setdefault(depth, []).append(1000 * depth / times["prefill_ms"])


def take_turns(engines: Mapping[str, Command], rounds: int, cwd: Path) -> dict[str, Speeds]:
    """Run every engine once a round: A B C, A B C, …

    Args:
        engines: name -> a command that prints the JSON of `tests.bench.decode_passes`.
        rounds: how often.
        cwd: where the commands run.

    Returns:
        name -> speeds.

    Raises:
        CommandFailedError: an engine could not run.
    """
    found = {name: Speeds() for name in engines}
    for _ in range(rounds):
        for name, command in engines.items():
            found[name].add(run_measured(command, cwd=cwd, timeout_s=300.0).stdout)
    return found


def paired_ratios(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """``left / right`` of each round: both saw the same minute of the machine."""
    return [a / b for a, b in zip(left, right, strict=True)]
