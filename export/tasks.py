"""Task folders as they enter a bundle: ``task.yaml`` and ``golden.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract.routing import check_routing
from edge_agent.contract.task import GoldenExample, TaskSpec, load_golden, load_task
from edge_agent.errors import RefusedError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.proof.calibrate import CALIBRATION_NAME

TASK_NAME = "task.yaml"
GOLDEN_NAME = "golden.jsonl"


@dataclass(frozen=True)
class TaskFolder:
    """A checked task.

    Args:
        path: its folder.
        spec: the parsed ``task.yaml``.
        golden: its golden examples; empty when the folder has none.
    """

    path: Path
    spec: TaskSpec
    golden: tuple[GoldenExample, ...]

    def files(self) -> dict[str, Path]:
        """Files that go into the bundle, by path inside it."""
        return self._present(TASK_NAME, GOLDEN_NAME, CALIBRATION_NAME)

    def calibration(self) -> dict[str, Path]:
        """The calibration that came with the task, by path inside the bundle; empty where there is none."""
        return self._present(CALIBRATION_NAME)

    def _present(self, *names: str) -> dict[str, Path]:
        present = [name for name in names if (self.path / name).is_file()]
        return {f"tasks/{self.spec.name}/{name}": self.path / name for name in present}


def check_answers(tasks: Sequence[TaskFolder], checkpoint: Checkpoint) -> None:
    """Compile every task's answers with the checkpoint's tokenizer, as the device will.

    Raises:
        EdgeError: ``task.*`` or ``bundle.unsupported`` for a schema that cannot be compiled, or a tokenizer that cannot
            write its answers.
    """
    encoder = TextEncoder(checkpoint.path / TOKENIZER_NAME, checkpoint.vocab_size)
    grammars = GuidedGrammars(encoder, checkpoint.vocab_size, checkpoint.eos_token_id)
    for task in tasks:
        compile_plan(task.spec, encoder, lambda: grammars)


def open_tasks(folders: Sequence[Path], max_context_tokens: int) -> list[TaskFolder]:
    """Read and check task folders.

    Args:
        folders: each holds ``task.yaml``.
        max_context_tokens: what the model can attend to.

    Raises:
        PermanentError: ``task.*`` with every fault of a file.
        RefusedError: ``export.task_repeated`` or ``export.context_too_small``.
    """
    tasks: dict[str, TaskFolder] = {}
    for folder in folders:
        spec = load_task(folder / TASK_NAME)
        if spec.name in tasks:
            raise RefusedError("export.task_repeated", f"two folders hold a task named {spec.name!r}")
        if spec.limits.max_prompt_tokens >= max_context_tokens:
            raise RefusedError(
                "export.context_too_small",
                f"task {spec.name!r} allows prompts of {spec.limits.max_prompt_tokens} tokens, but the model's context "
                f"is {max_context_tokens}",
            )
        golden_file = folder / GOLDEN_NAME
        golden = load_golden(golden_file, spec) if golden_file.is_file() else ()
        tasks[spec.name] = TaskFolder(folder, spec, golden)
    check_routing({name: task.spec for name, task in tasks.items()})
    return list(tasks.values())
