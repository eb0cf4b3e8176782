"""Training examples: token ids with a loss weight for every one of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice

import torch
from tokenizers import Tokenizer

from edge_agent.contract.output import BoolField
from edge_agent.contract.task import TaskSpec
from export.reference.cues import cue_labels, deviation_class
from export.reference.generator import LabelledEvent, generate
from export.reference.rules import REPEATS_THAT_RAISE, Decision
from export.reference.tokenizer import EOS
from export.reference.vocabulary import Split

SHARD_EVENTS = 6144
FORCED_WEIGHT = 0.02
"""Weight of keys and punctuation, which the device forces; not zero, so that plain decoding works as well."""

HARD_FIELDS = {"severity": 3.0}
"""Weight of fields that follow from many cues at once and are learned last; every other field counts 1."""


@dataclass(frozen=True)
class Example:
    """One event with its answer.

    Args:
        ids: prefix, rendered event, answer and EOS.
        weights: how much the prediction of each id counts; zero for the prompt.
        prompt_tokens: how many of the ids are prefix and event.
        cues: labels of the auxiliary heads.
        deviation_at: index of the last token of the deviation line, 0 without one.
        deviation: class of the deviation, 0 without one.
        count_at: index of the last token of the repeats line, 0 without one.
        count: 1 where the count raises the severity, else 0.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    prompt_tokens: int
    cues: tuple[int, ...]
    deviation_at: int
    deviation: int
    count_at: int
    count: int


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    Args:
        ids: (rows, length) int64.
        weights: (rows, length) float32.
        prompt_tokens: (rows,) int64.
        cues: (rows, cues) int64.
        deviation_at: (rows,) int64.
        deviation: (rows,) int64.
        count_at: (rows,) int64.
        count: (rows,) int64.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    prompt_tokens: torch.Tensor
    cues: torch.Tensor
    deviation_at: torch.Tensor
    deviation: torch.Tensor
    count_at: torch.Tensor
    count: torch.Tensor

    def part(self, index: int, parts: int) -> Batch:
        """Every ``parts``-th row from row ``index`` on."""
        rows = slice(index, None, parts)
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))


def canonical_answer(decision: Decision) -> str:
    """The one way to write an answer: compact JSON, fields in schema order."""
    return json.dumps(decision, separators=(",", ":"), ensure_ascii=False)


class Encoder:
    """Turns labelled events into examples; prefix, event and answer are encoded apart as on the device."""

    def __init__(self, tokenizer: Tokenizer, task: TaskSpec) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._prefix: list[int] = tokenizer.encode(task.prompt.prefix, add_special_tokens=False).ids
        self._eos = int(tokenizer.token_to_id(EOS))
        self._line_end = int(tokenizer.token_to_id("Ċ"))  # how byte-level BPE writes a line end
        labels = {getattr(item, "field", "deviation"): item.label for item in task.prompt.event}
        self._deviation_label, self._count_label = (
            int(tokenizer.encode(labels[name], add_special_tokens=False).ids[0]) for name in ("deviation", "count")
        )
        self._value_weights = {
            int(tokenizer.token_to_id(text)): HARD_FIELDS.get(field.name, 1.0)
            for field in task.output_fields
            for text in (("true", "false") if isinstance(field, BoolField) else getattr(field, "values", ()))
        }

    def prompt(self, labelled: LabelledEvent) -> list[int]:
        """Token ids of prefix and rendered event."""
        rendered = self._task.render(labelled.event)
        return [*self._prefix, *self._tokenizer.encode(rendered, add_special_tokens=False).ids]

    def examples(self, events: Sequence[LabelledEvent]) -> list[Example]:
        """Encode a shard at once, which is several times faster than one by one."""
        rendered = self._tokenizer.encode_batch([self._task.render(e.event) for e in events], add_special_tokens=False)
        answers = self._tokenizer.encode_batch([canonical_answer(e.decision) for e in events], add_special_tokens=False)
        return [self._example(r.ids, a.ids, e) for r, a, e in zip(rendered, answers, events, strict=True)]

    def _example(self, event: list[int], answer: list[int], labelled: LabelledEvent) -> Example:
        # Quotes and keys are never value ids, so a table decides; "unknown" is a value of two fields of equal weight.
        answer_weights = [self._value_weights.get(token, FORCED_WEIGHT) for token in answer]
        ids = (*self._prefix, *event, *answer, self._eos)
        prompt_tokens = len(self._prefix) + len(event)
        percent, count = labelled.situation.deviation_percent, labelled.event.get("count")
        return Example(
            ids,
            (*([0.0] * prompt_tokens), *answer_weights, FORCED_WEIGHT),
            prompt_tokens,
            cue_labels(labelled.situation),
            deviation_at=0 if percent is None else self._line_end_of(event, self._deviation_label),
            deviation=0 if percent is None else deviation_class(percent),
            count_at=self._line_end_of(event, self._count_label) if isinstance(count, int) else 0,
            count=int(isinstance(count, int) and count >= REPEATS_THAT_RAISE),
        )

    def _line_end_of(self, event: list[int], label: int) -> int:
        """Index in the example of the last token before the line end of the line that ``label`` opens."""
        # Line ends are tokens of their own, so the token after one is at the start of a line.
        starts = (0, *(i + 1 for i, token in enumerate(event) if token == self._line_end))
        line = next(i for i in starts if event[i] == label)
        return len(self._prefix) + event.index(self._line_end, line) - 1


def shard(encoder: Encoder, split: Split, seed: int) -> list[Example]:
    """`SHARD_EVENTS` fresh examples."""
    return encoder.examples(list(islice(generate(split, seed), SHARD_EVENTS)))


def batches(examples: Sequence[Example], rng: random.Random, *, tokens: int, pad_id: int) -> Iterator[Batch]:
    """Length-bucketed batches of about ``tokens`` tokens, in random order."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    groups: list[list[Example]] = [[]]
    for example in ordered:
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > tokens:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    for group in groups:
        length = max(len(example.ids) for example in group)
        ids = torch.full((len(group), length), pad_id, dtype=torch.int64)
        weights = torch.zeros((len(group), length), dtype=torch.float32)
        for row, example in enumerate(group):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            weights[row, : len(example.ids)] = torch.tensor(example.weights)
        yield Batch(
            ids,
            weights,
            torch.tensor([example.prompt_tokens for example in group]),
            torch.tensor([example.cues for example in group]),
            torch.tensor([example.deviation_at for example in group]),
            torch.tensor([example.deviation for example in group]),
            torch.tensor([example.count_at for example in group]),
            torch.tensor([example.count for example in group]),
        )
