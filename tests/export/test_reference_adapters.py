"""The worked example: its tasks fit together, and its trainer writes what the exporter reads."""

from __future__ import annotations

from pathlib import Path

import torch

from edge_agent.contract.task import load_task
from export.checkpoint.peft import open_adapter
from export.checkpoint.source import open_checkpoint
from export.reference.adapters import MODULES, train_adapter
from export.reference.bundle_build import CHECKPOINT
from export.smaller.recovery import INT4_NEVER, Training
from export.tasks import check_answers, open_tasks

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "specialists"


def test_the_tasks_of_the_example_can_be_built_together() -> None:
    tasks = open_tasks(sorted(EXAMPLES.iterdir()), 512)
    check_answers(tasks, open_checkpoint(CHECKPOINT))
    assert [task.spec.name for task in tasks] == ["fluids", "interlock", "triage"]


def test_a_trained_adapter_is_one_that_the_exporter_reads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    training = Training(minutes=None, steps=3, tokens=512, peak_rate=2e-3, int4_from=INT4_NEVER)
    task = load_task(EXAMPLES / "fluids" / "task.yaml")
    taught = train_adapter(checkpoint, task, training, 40, tmp_path / "fluids")
    adapter = open_adapter(tmp_path / "fluids", checkpoint)
    assert len(adapter.updates) == 5 * len(MODULES)
    assert adapter.rank == 8
    assert taught.steps == 3
    assert taught.kept == any(bool(torch.any(update.up != 0)) for update in adapter.updates.values())
