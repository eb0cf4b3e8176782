"""Training examples: token ids with a loss weight for every one of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer

from edge_agent.contract.task import BoolField, TaskSpec
from export.reference.cues import cue_labels
from export.reference.generator import LabelledEvent, generate
from export.reference.rules import Decision
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
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    prompt_tokens: int
    cues: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    Args:
        ids: (rows, length) int64.
        weights: (rows, length) float32.
        prompt_tokens: (rows,) int64.
        cues: (rows, cues) int64.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    prompt_tokens: torch.Tensor
    cues: torch.Tensor

    def part(self, index: int, parts: int) -> Batch:
        """Every ``parts``-th row from row ``index`` on."""
        rows = slice(index, None, parts)
        return Batch(self.ids[rows], self.weights[rows], self.prompt_tokens[rows], self.cues[rows])


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
        return [
            self._example(r.ids, a.ids, cue_labels(e.situation))
            for r, a, e in zip(rendered, answers, events, strict=True)
        ]

    def _example(self, event: list[int], answer: list[int], cues: tuple[int, ...]) -> Example:
        prompt_tokens = len(self._prefix) + len(event)
        # Quotes and keys are never value ids, so a table decides; "unknown" is a value of two fields of equal weight.
        answer_weights = [self._value_weights.get(token, FORCED_WEIGHT) for token in answer]
        ids = (*self._prefix, *event, *answer, self._eos)
        return Example(ids, (*([0.0] * prompt_tokens), *answer_weights, FORCED_WEIGHT), prompt_tokens, cues)


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
        prompt_tokens = torch.tensor([example.prompt_tokens for example in group])
        yield Batch(ids, weights, prompt_tokens, torch.tensor([example.cues for example in group]))
