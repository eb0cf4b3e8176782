"""The larger model as a teacher: how sure it is at each choice, and what it answers where nobody did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError, PermanentError, RefusedError
from edge_agent.runtime.grammar import Branch, ClosedField, Done
from export.smaller.lessons import Batch, Lesson, LessonWriter, Row
from export.smaller.smaller_checkpoint import Model

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Fit:
    """How near a model is to its teacher and to the answers.

    Args:
        kl_nats: mean Kullback-Leibler divergence KL(teacher || model) of a choice; None without a teacher.
        loss_nats: mean negative log-probability of the answer's choices.
        right: share of choices (0..1) where the model's likeliest option is the answer's.
    """

    kl_nats: float | None
    loss_nats: float
    right: float

    def is_better_than(self, other: Fit) -> bool:
        """Whether it is nearer to the teacher, or to the answers where there is no teacher; as near will do."""
        if self.kl_nats is None or other.kl_nats is None:
            return self.loss_nats <= other.loss_nats
        return self.kl_nats <= other.kl_nats

    def as_dict(self) -> dict[str, float | None]:
        """JSON form, four decimals."""
        return {
            "kl_nats": None if self.kl_nats is None else round(self.kl_nats, 4),
            "loss_nats": round(self.loss_nats, 4),
            "right": round(self.right, 4),
        }


def final_states(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Normed states of right-padded rows: int64 (rows, length) -> (rows, length, hidden)."""
    # No padding mask: attention is causal, and what is padded lies to the right of all that is read.
    states: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
    return states


def choice_log_probs(model: Model, states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-softmax over the options of every closed choice.

    Returns:
        float32 (choices, widest); 0 beyond a choice's options, so that products with a probability of 0 stay 0.
    """
    logits = logits_at(model, states, batch.at)  # (choices, vocab)
    options = logits.gather(1, batch.allowed).masked_fill(~batch.is_option, float("-inf"))
    return options.log_softmax(dim=-1).masked_fill(~batch.is_option, 0.0)


def logits_at(model: Model, states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Logits at chosen places: int64 (2, places) -> float32 (places, vocab)."""
    logits: torch.Tensor = model.lm_head(states[at[0], at[1]]).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def divergence(teacher: torch.Tensor, student: torch.Tensor, batch: Batch) -> torch.Tensor:
    """KL(teacher || student) of every closed choice: two (choices, widest) -> (choices,)."""
    probabilities = teacher.exp().masked_fill(~batch.is_option, 0.0)
    return (probabilities * (teacher - student)).sum(dim=-1)


class Teacher:
    """A frozen model that remembers its answers: the same lessons come round again.

    Args:
        model: the larger model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[int, torch.Tensor] = {}

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """`choice_log_probs` of the teacher."""
        if any(number not in self._known for number in batch.numbers):
            with torch.no_grad(), evaluating(self.model):
                found = choice_log_probs(self.model, final_states(self.model, batch.ids), batch)
            for number, (begin, end) in zip(batch.numbers, batch.spans, strict=True):
                self._known[number] = found[begin:end]
        return torch.cat([self._known[number] for number in batch.numbers])


def fit(model: Model, teacher: Teacher | None, lessons: Sequence[Batch]) -> Fit:
    """Compare a model with its teacher and with the answers, along the answers' own tokens.

    Args:
        model: the model.
        teacher: None where there is none.
        lessons: batches of lessons.
    """
    kl = loss = 0.0
    choices = right = asked = 0
    with torch.no_grad(), evaluating(model):
        for batch in lessons:
            states = final_states(model, batch.ids)
            found = choice_log_probs(model, states, batch)
            choices += len(found)
            asked += len(found) + len(batch.open_target)
            loss -= float(found.gather(1, batch.target[:, None]).sum())
            if teacher is not None:
                kl += float(divergence(teacher.log_probs(batch), found, batch).sum())
            right += int((found.masked_fill(~batch.is_option, float("-inf")).argmax(dim=-1) == batch.target).sum())
            if len(batch.open_target):
                logits = logits_at(model, states, batch.open_at)  # (tokens, vocab)
                loss += float(torch.nn.functional.cross_entropy(logits, batch.open_target, reduction="sum"))
                right += int((logits.argmax(dim=-1) == batch.open_target).sum())
    return Fit(None if teacher is None else kl / max(1, choices), loss / max(1, asked), right / max(1, asked))


def write_lessons(rows: Sequence[Row], writer: LessonWriter, model: Model) -> list[Lesson]:
    """Lessons of all rows; the model answers those that have no decision.

    Raises:
        PermanentError: ``export.data_invalid`` for an event that the task cannot read.
        RefusedError: ``export.unlabelled_open`` where the task has a field that only a person can answer for.
    """
    for number, row in enumerate(rows, start=1):
        try:
            writer.prompt(row.event)
        except EdgeError as error:
            raise PermanentError("export.data_invalid", f"event {number}: {error}") from error
    unlabelled = [row.event for row in rows if row.decision is None]
    if unlabelled and not all(isinstance(field, ClosedField) for field in writer.plan.fields):
        raise RefusedError(
            "export.unlabelled_open", f"{len(unlabelled)} events have no decision, and the task has an open field"
        )
    answers = iter(answer(model, writer, unlabelled))
    return [writer.lesson(row, next(answers) if row.decision is None else row.decision) for row in rows]


def answer(model: Model, writer: LessonWriter, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Greedy constrained answers, as the device gives them (before guards).

    Args:
        model: any causal model.
        writer: knows prompts and the plan of answers; every field is closed.
        events: to answer.
    """
    walks = [_Walk(writer, event) for event in events]
    ordered = sorted(walks, key=lambda walk: len(walk.ids))
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(ordered), ROWS_AT_ONCE):
            waiting = [walk for walk in ordered[start : start + ROWS_AT_ONCE] if walk.branch is not None]
            while waiting:
                length = max(len(walk.ids) for walk in waiting)
                ids = torch.tensor([walk.ids + [0] * (length - len(walk.ids)) for walk in waiting])  # (rows, length)
                last = torch.tensor([[row, len(walk.ids) - 1] for row, walk in enumerate(waiting)]).T
                logits = logits_at(model, final_states(model, ids), last)  # (rows, vocab)
                for walk, scores in zip(waiting, logits, strict=True):
                    walk.choose(scores)
                waiting = [walk for walk in waiting if walk.branch is not None]
    return [walk.decision for walk in walks]


class _Walk:
    """One answer in the making: the ids so far and the next choice."""

    def __init__(self, writer: LessonWriter, event: Event) -> None:
        self.ids = [*writer.prompt(event), *writer.plan.opening]
        self.decision: dict[str, Any] = {}
        self.branch: Branch | None = None
        self._fields = iter(writer.plan.fields)
        self._name = ""
        self._next_field()

    def choose(self, logits: torch.Tensor) -> None:
        """Take the likeliest option: float32 (vocab,)."""
        if self.branch is None:
            raise RuntimeError("the answer is complete")
        best = int(logits[torch.from_numpy(self.branch.ids)].argmax())
        edge = self.branch.edges[best]
        self.ids += [int(self.branch.ids[best]), *edge.forced]
        self._arrive(edge.target)

    def _arrive(self, node: Branch | Done) -> None:
        if isinstance(node, Done):
            self.decision[self._name] = node.value
            self._next_field()
        else:
            self.branch = node

    def _next_field(self) -> None:
        self.branch = None
        planned = next(self._fields, None)
        if isinstance(planned, ClosedField):
            self._name = planned.name
            self.ids += planned.forced
            self._arrive(planned.root)


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Switch dropout off inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
