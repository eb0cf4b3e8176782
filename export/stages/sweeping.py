"""Stage *sweep*: which method, block size and eight-bit layers to take, found by trying them on the task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_agent.contract.manifest import ModelSpec
from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.contract.thresholds import Floors
from edge_agent.errors import PermanentError
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.pipeline import Progress
from export.proof.evaluate import evaluate, greedy_backend
from export.proof.greedy import GreedyDecoder
from export.proof.measure import THREADS
from export.quantisation.quantize import QuantSettings
from export.quantisation.sweep import SWEEP_NAME, Judge, SweepInputs, sweep
from export.stages.layout import DECODER, SENSITIVITY_NAME
from export.texts import TaskTexts

JUDGED_EVENTS = 100
CHOSEN_NAME = "chosen.json"
_NO_FLOORS = Floors({}, {})
"""Candidates are judged by right answers; which of them are sure enough is not known before the end."""


def try_all(
    fused: Path, texts: TaskTexts, judge: Judge | None, budget_s: float, folder: Path, progress: Progress
) -> None:
    """Try combinations within a budget and note the knee.

    Args:
        fused: outputs of stage *fuse*.
        texts: the tasks' own, on which candidates are calibrated and scored.
        judge: accuracy on labelled events, where there are any.
        budget_s: seconds.
        folder: receives ``sweep.json``, ``sensitivity.json`` and ``chosen.json``.
        progress: is told of every candidate.

    Raises:
        RefusedError: ``export.calibration_missing``.
        PermanentError: ``export.sweep_empty`` when the budget was too short for one candidate.
    """
    inputs = SweepInputs(fused / DECODER, texts.golden(), texts.calibration(), judge)
    found = sweep(inputs, folder, budget_s, log=progress.line)
    if found.knee is None:
        raise PermanentError("export.sweep_empty", f"no combination could be tried in {budget_s:.0f} s")
    knee = found.knee
    settings = QuantSettings(knee.method, knee.block_size, knee.symmetric, knee.int8_nodes)
    (folder / CHOSEN_NAME).write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")
    sensitive = [one.as_dict(knee.int8_nodes) for one in found.sensitivity]
    (folder / SENSITIVITY_NAME).write_text(json.dumps(sensitive, indent=2) + "\n", "utf-8")
    progress.line(f"the knee of {len(found.rows)} combinations: {knee.label}, {knee.bytes:,} bytes")


def make_judge(checkpoint: Checkpoint, spec: ModelSpec, task: TaskSpec, rows: Sequence[GoldenExample]) -> Judge:
    """Accuracy of a graph on labelled events, by the oracle: a candidate is no bundle yet.

    Args:
        checkpoint: its tokenizer.
        spec: of the fused graph.
        task: the task.
        rows: labelled events, of which the first `JUDGED_EVENTS` count.
    """

    def judge(graph: Path) -> float:
        decoder = GreedyDecoder(graph, checkpoint.path / TOKENIZER_NAME, spec, threads=THREADS)
        return evaluate(greedy_backend(decoder, task), rows[:JUDGED_EVENTS], task, _NO_FLOORS).exact

    return judge


def chosen_settings(swept: Path) -> QuantSettings:
    """The knee, as settings of stage *quantise*."""
    stored = json.loads((swept / CHOSEN_NAME).read_text("utf-8"))
    return QuantSettings(**{**stored, "int8_nodes": tuple(stored["int8_nodes"])})


def sweep_facts(swept: Path) -> list[dict[str, Any]]:
    """Rows for the report card, without speeds: those differ from run to run, and a bundle's bytes must not."""
    rows: list[dict[str, Any]] = json.loads((swept / SWEEP_NAME).read_text("utf-8"))
    return [{key: value for key, value in row.items() if not key.endswith("_tok_per_s")} for row in rows]


def swept_sensitivity(swept: Path) -> dict[str, Any]:
    """``{"sensitivity": …}`` for the report card where eight bits were tried, else nothing."""
    rows = json.loads((swept / SENSITIVITY_NAME).read_text("utf-8"))
    return {"sensitivity": rows} if rows else {}
