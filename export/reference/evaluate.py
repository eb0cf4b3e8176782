"""Per-field accuracy of any backend that turns an event into a decision, and of a checkpoint in fp32 torch.

Run ``python -m export.reference.evaluate export/reference/checkpoint --json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from edge_agent.contract.event import Event
from edge_agent.contract.output import BoolField, EnumField
from edge_agent.contract.task import TaskSpec, load_task
from edge_agent.errors import EdgeError
from export.reference.checkpoint import load_checkpoint
from export.reference.examples import Encoder
from export.reference.generator import LabelledEvent, generate
from export.reference.rules import Decision
from export.reference.tokenizer import load_tokenizer
from export.reference.vocabulary import Split

HERE = Path(__file__).parent
TASK_FILE = HERE / "task" / "task.yaml"
HELDOUT_FILE = HERE / "data" / "heldout.jsonl"
Row = tuple[Event, Decision]


@dataclass(frozen=True)
class Accuracy:
    """How often each field was right.

    Args:
        rows: number of events.
        fields: share of right answers (0..1) for each field.
        exact: share of events with every field right.
        confusions: the most frequent (field, gold, answer, count) of wrong answers.
    """

    rows: int
    fields: dict[str, float]
    exact: float
    confusions: tuple[tuple[str, str, str, int], ...]

    def as_text(self) -> str:
        """A table for a person."""
        shares = {**self.fields, "exact": self.exact}
        lines = [f"{name:<10} {share:7.2%}" for name, share in shares.items()]
        lines += [f"  {count:4d} x {name}: {gold} answered as {said}" for name, gold, said, count in self.confusions]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "rows": self.rows,
            "fields": {name: round(share, 4) for name, share in self.fields.items()},
            "exact": round(self.exact, 4),
            "confusions": [list(confusion) for confusion in self.confusions],
        }


def measure(decide: Callable[[Event], Decision], rows: Sequence[Row]) -> Accuracy:
    """Compare any backend's decisions with the gold ones.

    Args:
        decide: the backend: an event in, a decision out.
        rows: events with gold decisions.

    Returns:
        Shares of right answers.
    """
    return compare([decide(event) for event, _ in rows], [gold for _, gold in rows])


def compare(answers: Sequence[Decision], golds: Sequence[Decision]) -> Accuracy:
    """Accuracy of answers that were already made (same length and order as ``golds``)."""
    wrong: dict[tuple[str, str, str], int] = {}
    right = dict.fromkeys(golds[0], 0)
    exact = 0
    for answer, gold in zip(answers, golds, strict=True):
        exact += answer == gold
        for name, value in gold.items():
            if answer[name] == value:
                right[name] += 1
            else:
                key = (name, str(value), str(answer[name]))
                wrong[key] = wrong.get(key, 0) + 1
    top = sorted(wrong.items(), key=lambda item: -item[1])[:20]
    count = len(golds)
    return Accuracy(
        count,
        {name: hits / count for name, hits in right.items()},
        exact / count,
        tuple((*key, times) for key, times in top),
    )


class TorchDecider:
    """The checkpoint in fp32 with constrained argmax: at every value only the allowed tokens compete.

    Args:
        model: a causal language model.
        encoder: the encoder of the task.
        task: the task.
        token_id: text of a value to its single token id.
    """

    def __init__(self, model: LlamaForCausalLM, encoder: Encoder, task: TaskSpec, tokenizer: Any) -> None:
        self._model = model
        self._encoder = encoder
        self._steps: list[tuple[str, list[int], list[str | bool], list[int]]] = []
        for index, field in enumerate(task.output_fields):
            quote = '"' if isinstance(field, EnumField) else ""
            opening = "{" if index == 0 else ('",' if self._quoted(task, index - 1) else ",")
            forced = tokenizer.encode(f'{opening}"', add_special_tokens=False).ids
            forced += tokenizer.encode(f'{field.name}":{quote}', add_special_tokens=False).ids
            values: list[str | bool] = [False, True] if isinstance(field, BoolField) else []
            if isinstance(field, EnumField):
                values = list(field.values)
            texts = [str(v).lower() if isinstance(v, bool) else v for v in values]
            self._steps.append((field.name, forced, values, [int(tokenizer.token_to_id(t)) for t in texts]))

    @staticmethod
    def _quoted(task: TaskSpec, index: int) -> bool:
        return isinstance(task.output_fields[index], EnumField)

    def decide_all(self, events: Sequence[LabelledEvent], *, rows: int = 64) -> list[Decision]:
        """Decide many events, ``rows`` at a time (sorted by length inside, answers in the given order)."""
        prompts = [self._encoder.prompt(event) for event in events]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[Decision] = [{} for _ in prompts]
        with torch.inference_mode():
            for start in range(0, len(order), rows):
                chosen = order[start : start + rows]
                for index, answer in zip(chosen, self._decide([prompts[i] for i in chosen]), strict=True):
                    answers[index] = answer
        return answers

    def _decide(self, prompts: list[list[int]]) -> list[Decision]:
        sequences = [list(prompt) for prompt in prompts]
        answers: list[Decision] = [{} for _ in prompts]
        for name, forced, values, allowed in self._steps:
            for sequence in sequences:
                sequence.extend(forced)
            length = max(map(len, sequences))
            ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences])  # (rows, length)
            hidden = self._model.model(ids).last_hidden_state  # (rows, length, hidden)
            last = hidden[torch.arange(len(sequences)), torch.tensor([len(s) - 1 for s in sequences])]
            logits = self._model.lm_head(last)[:, allowed]  # (rows, allowed values)
            for row, pick in enumerate(logits.argmax(dim=-1).tolist()):
                answers[row][name] = values[pick]
                sequences[row].append(allowed[pick])
        return answers


def evaluate_checkpoint(folder: Path, events: Sequence[LabelledEvent], task_file: Path = TASK_FILE) -> Accuracy:
    """Accuracy of a checkpoint folder on labelled events, fp32 torch."""
    task, tokenizer = load_task(task_file), load_tokenizer(folder)
    decider = TorchDecider(load_checkpoint(folder), Encoder(tokenizer, task), task, tokenizer)
    return compare(decider.decide_all(events), [event.decision for event in events])


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint on the reference task's held-out events.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--events", type=int, default=2000, help="number of events (default 2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    split: Split = arguments.split
    try:
        accuracy = evaluate_checkpoint(
            arguments.checkpoint, list(islice(generate(split, arguments.seed), arguments.events))
        )
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if arguments.json:
        sys.stdout.write(json.dumps(accuracy.as_dict(), indent=2) + "\n")
    else:
        sys.stdout.write(accuracy.as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
