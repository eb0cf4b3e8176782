"""The task's own texts as token ids: what calibrated quantisation, pruned vocabularies and comparisons look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain

from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.prompt import event_prompt
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.request import Labelled
from export.tasks import TaskFolder

Text = tuple[list[int], list[int]]
"""Token ids of a prompt (prefix and event) and of its answer."""


CALIBRATION_TEXTS = 128
"""Texts a task that calibrated quantisation looks at; more changed nothing that could be measured."""
SCORED_TEXTS = 16
"""Golden examples a task on which graphs are compared token by token."""


class TaskTexts:
    """Renders a build's labelled events exactly as the device does.

    Args:
        checkpoint: its tokenizer and its beginning-of-text token.
        tasks: the bundle's tasks, with their golden examples.
        labelled: labelled events by task.
    """

    def __init__(
        self, checkpoint: Checkpoint, tasks: Sequence[TaskFolder], labelled: Mapping[str, Labelled] | None = None
    ) -> None:
        self._start = [] if checkpoint.bos_token_id is None else [checkpoint.bos_token_id]
        self._encoder = TextEncoder(checkpoint.path / TOKENIZER_NAME, checkpoint.vocab_size)
        self._tasks = tuple(tasks)
        self._labelled = labelled or {}

    def text(self, task: TaskSpec, row: GoldenExample) -> Text:
        """One labelled event.

        Raises:
            RefusedError: ``event.*``.
        """
        prefix = self._encoder.encode(task.prompt.prefix)
        event = event_prompt(task, dict(row.event), self._encoder.encode).ids
        answer = json.dumps(dict(row.decision), separators=(",", ":"), ensure_ascii=False)
        return [*self._start, *prefix, *event], self._encoder.encode(answer)

    def golden(self, most_per_task: int = SCORED_TEXTS) -> list[Text]:
        """Golden examples of every task; the prefix where no task has one."""
        found = [self.text(task.spec, row) for task in self._tasks for row in task.golden[:most_per_task]]
        # Without golden examples the prefixes are all that is known of the input.
        return found or [
            ([*self._start, *self._encoder.encode("\n")], self._encoder.encode(task.spec.prompt.prefix))
            for task in self._tasks
        ]

    def calibration(self, most_per_task: int = CALIBRATION_TEXTS) -> list[list[int]]:
        """Whole texts (prompt and answer) to calibrate on: labelled events first, golden examples after them."""
        found = []
        for task in self._tasks:
            labelled = self._labelled.get(task.spec.name)
            rows = [*(labelled.calibrate_on if labelled else []), *task.golden]
            found += [list(chain(*self.text(task.spec, row))) for row in rows[:most_per_task]]
        return found
