"""The task's own texts as token ids: what calibrated quantisation, pruned vocabularies and comparisons look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.prompt import event_prompt
from export.request import Labelled
from export.source import TOKENIZER_NAME, Checkpoint
from export.tasks import TaskFolder

Text = tuple[list[int], list[int]]
"""Token ids of a prompt (prefix and event) and of its answer."""


class TaskTexts:
    """Renders labelled events exactly as the device does.

    Args:
        checkpoint: its tokenizer and its beginning-of-text token.
        tokenizer: another place of the tokenizer; default: the checkpoint's folder.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Path | None = None) -> None:
        self._start = [] if checkpoint.bos_token_id is None else [checkpoint.bos_token_id]
        self._encoder = TextEncoder(tokenizer or checkpoint.path / TOKENIZER_NAME, checkpoint.vocab_size)

    def text(self, task: TaskSpec, row: GoldenExample) -> Text:
        """One labelled event.

        Raises:
            RefusedError: ``event.*``.
        """
        prefix = self._encoder.encode(task.prompt.prefix)
        event = event_prompt(task, dict(row.event), self._encoder.encode).ids
        answer = json.dumps(dict(row.decision), separators=(",", ":"), ensure_ascii=False)
        return [*self._start, *prefix, *event], self._encoder.encode(answer)

    def golden(self, tasks: Sequence[TaskFolder], most_per_task: int) -> list[Text]:
        """Golden examples of every task; the prefix where a task has none."""
        found = [self.text(task.spec, row) for task in tasks for row in task.golden[:most_per_task]]
        # Without golden examples the prefixes are all that is known of the input.
        return found or [
            ([*self._start, *self._encoder.encode("\n")], self._encoder.encode(task.spec.prompt.prefix))
            for task in tasks
        ]

    def calibration(
        self, tasks: Sequence[TaskFolder], labelled: Mapping[str, Labelled], most_per_task: int
    ) -> list[list[int]]:
        """Whole texts (prompt and answer) to calibrate on: labelled events first, golden examples after them."""
        return [
            list(chain(*self.text(task.spec, row)))
            for task in tasks
            for row in [*labelled[task.spec.name].calibrate_on, *task.golden][:most_per_task]
        ]
