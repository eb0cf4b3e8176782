"""The short training that follows pruning and makes distillation: a student learns a teacher's choices.

At every choice of an answer the student is pulled towards the teacher's distribution over the allowed tokens, and
towards the label where there is one. The budget is a number of steps; minutes are turned into steps once, by a
rehearsal, so that a run can be repeated exactly. State lies on disk: a power cut costs at most `Training.save_s`.

Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015 (without its temperature: over
the few allowed tokens the teacher's own probabilities are what the device's confidence is made of).
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edge_agent.errors import PermanentError, RefusedError, from_os_error
from edge_agent.fs import move_durable
from export.smaller.lessons import Batch, Lesson, batches, digest_of
from export.smaller.rounding import int4_weights
from export.smaller.smaller_checkpoint import Model
from export.smaller.teacher import Fit, Teacher, choice_log_probs, divergence, final_states, fit, logits_at

Log = Callable[[str], None]
STATE_NAME = "state.pt"
INT4_NEVER = 2.0
"""A value of `Training.int4_from` that no step reaches."""

HELD_BACK_SHARE, HELD_BACK_MOST = 0.1, 256
"""Lessons that are measured and never taught."""

_REHEARSED_STEPS = 4
_SAY_EVERY_S = 15.0
_MOST_OF_TIME_SAVING = 0.05


PRUNED_RATE, STUDENT_RATE = 1e-4, 1e-3
"""What is left of a pruned model is nearly right, and a rate that teaches a student would undo that: measured on the
reference model, 1e-3 took it twice as far from the whole model, 1e-4 brought it twice as near."""


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        minutes: about how long, on this machine as fast as it is now; turned into steps once.
        steps: how long instead, exactly. One of the two is None.
        tokens: ids a step.
        peak_rate: highest learning rate; warm-up is linear, then a cosine to zero.
        warmup: share of the steps for warm-up.
        label_share: weight of the label beside the teacher's distribution, 0..1, where there is a label.
        int4_from: from this share of the steps on the forward pass sees INT4 weights; above 1 never.
        seed: of the order of lessons (and of a student's random weights).
        threads: torch's threads. Their number is part of the result: sums are formed in another order.
        save_s: seconds between states on disk, more where saving is slow.
    """

    minutes: float | None = 10.0
    steps: int | None = None
    tokens: int = 2304
    peak_rate: float = PRUNED_RATE
    warmup: float = 0.05
    label_share: float = 0.5
    int4_from: float = 0.7
    seed: int = 7
    threads: int = 1
    save_s: float = 60.0

    def check(self) -> None:
        """Refuse a budget that is none.

        Raises:
            RefusedError: ``export.budget_invalid``.
        """
        given = [value for value in (self.minutes, self.steps) if value is not None]
        if len(given) != 1 or not given[0] > 0 or not math.isfinite(given[0]):
            raise RefusedError("export.budget_invalid", "a training needs a number of steps or of minutes, above zero")
        if self.threads < 1 or self.tokens < 1 or not 0 < self.peak_rate < 1 or not 0 <= self.label_share <= 1:
            raise RefusedError("export.budget_invalid", "threads, tokens, learning rate or label share out of range")


@dataclass(frozen=True)
class Taught:
    """What a training did.

    Args:
        steps: steps taken.
        lessons: lessons that were taught.
        held_back: lessons that were measured instead.
        before: fit on the lessons held back, before the first step.
        after: the same after the last; both with INT4 weights where training ends with them.
        kept: whether the trained weights were kept: a training that made the fit worse is undone.
    """

    steps: int
    lessons: int
    held_back: int
    before: Fit
    after: Fit
    kept: bool

    def as_dict(self, training: Training) -> dict[str, Any]:
        """JSON form with all that is needed to repeat it."""
        settings = {name: value for name, value in asdict(training).items() if name not in ("minutes", "save_s")}
        facts = {"lessons": self.lessons, "held_back": self.held_back}
        return {
            **settings,
            **facts,
            "steps": self.steps,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "kept": self.kept,
        }


def teach(
    student: Model, teacher: Teacher | None, lessons: Sequence[Lesson], training: Training, work: Path, log: Log
) -> Taught:
    """Train a student in place.

    Args:
        student: its weights are changed.
        teacher: whose choices it learns; None where only labels are to be learnt.
        lessons: all of them; some are held back to measure.
        training: how.
        work: folder of the state; a state of this very training there is resumed.
        log: receives progress.

    Returns:
        What was done.

    Raises:
        RefusedError: ``export.budget_invalid``.
        PermanentError: ``export.data_invalid`` for fewer than two lessons, ``export.recovery_diverged``.
        EdgeError: ``disk.*``.
    """
    training.check()
    if len(lessons) < 2:
        raise PermanentError("export.data_invalid", "one event to learn and one to measure are the least")
    with torch_threads(training.threads):
        return _Course(student, teacher, lessons, training, work, log).run()


class _Course:
    """One training run."""

    def __init__(
        self,
        student: Model,
        teacher: Teacher | None,
        lessons: Sequence[Lesson],
        training: Training,
        work: Path,
        log: Log,
    ) -> None:
        self._student, self._teacher, self._training, self._log = student, teacher, training, log
        mixed = list(lessons)
        random.Random(training.seed).shuffle(mixed)  # noqa: S311 - reproducible, not secret
        held_back = max(1, min(HELD_BACK_MOST, int(len(mixed) * HELD_BACK_SHARE)))
        self._lessons, self._held_back = mixed[held_back:], mixed[:held_back]
        self._state_file = work / STATE_NAME
        self._key = f"{digest_of(mixed)} {training!r} {student.config.to_json_string()}"
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        # No decay: a short training shall not shrink what it does not visit, such as the rows of rare tokens.
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self._step = 0
        self._steps = 0
        self._before: Fit | None = None
        self._first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        self._epoch_of_order = -1
        self._order: list[Batch] = []

    def run(self) -> Taught:
        """Train to the end of the budget."""
        if not self._resume():
            self._before = self._measure()
            self._steps = self._training.steps or self._rehearse()
        self._student.train()
        started_s = said_s = saved_s = time.monotonic()
        window: list[float] = []
        pause_s = self._training.save_s
        while self._step < self._steps:
            window.append(self._update(self._batch(self._step)))
            self._step += 1
            now_s = time.monotonic()
            if now_s - saved_s >= pause_s:
                self._save()
                saved_s = time.monotonic()
                pause_s = max(self._training.save_s, (saved_s - now_s) / _MOST_OF_TIME_SAVING)
            if now_s - said_s >= _SAY_EVERY_S or self._step == self._steps:
                minutes = (now_s - started_s) / 60
                mean = sum(window) / len(window)
                self._log(f"step {self._step} of {self._steps}, {minutes:.1f} min: loss {mean:.4f} nats a choice")
                said_s, window = now_s, []
        self._student.eval()
        after, before = self._measure(), self._before or self._measure()
        self._log(f"held-back events: {_words(before)} before, {_words(after)} after")
        kept = after.is_better_than(before)
        if not kept:
            self._student.load_state_dict(self._first)
            self._log("the training made it worse and is undone: more events, more steps or a lower rate may help")
        return Taught(self._steps, len(self._lessons), len(self._held_back), before, after, kept)

    def _batch(self, step: int) -> Batch:
        """The batch of a step, whichever steps this run has taken itself."""
        if self._epoch_of_order < 0:
            self._order_lessons(0)
        epoch, index = divmod(step, len(self._order))
        if epoch != self._epoch_of_order:
            self._order_lessons(epoch)
        return self._order[index]

    def _order_lessons(self, epoch: int) -> None:
        rng = random.Random(self._training.seed * 1_000_003 + epoch)  # noqa: S311 - reproducible, not secret
        self._order = list(batches(self._lessons, rng, tokens=self._training.tokens))
        self._epoch_of_order = epoch

    def _measure(self) -> Fit:
        rng = random.Random(0)  # noqa: S311 - any order will do
        # A teacher of its own: lessons held back have numbers of their own.
        teacher = None if self._teacher is None else Teacher(self._teacher.model)
        ends_in_int4 = self._training.int4_from <= 1
        with int4_weights(self._student) if ends_in_int4 else nullcontext():
            return fit(self._student, teacher, list(batches(self._held_back, rng, tokens=self._training.tokens)))

    def _rehearse(self) -> int:
        """How many steps fit the minutes: gradients of a few batches are formed and thrown away."""
        minutes = self._training.minutes or 0.0
        self._loss(self._batch(0)).backward()  # the first is slow: libraries prepare their kernels
        started_s = time.monotonic()
        for step in range(1, 1 + _REHEARSED_STEPS):  # others than the first: the teacher remembers what it answered
            self._loss(self._batch(step)).backward()
        step_s = (time.monotonic() - started_s) / _REHEARSED_STEPS
        self._optimizer.zero_grad()
        steps = max(1, round(minutes * 60 / step_s))
        self._log(f"{minutes:g} minutes are about {steps} steps of {step_s:.2f} s here")
        return steps

    def _weights(self) -> AbstractContextManager[None]:
        progress = self._step / self._steps if self._steps else 0.0
        return int4_weights(self._student) if progress >= self._training.int4_from else nullcontext()

    def _update(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        with self._weights():
            loss = self._loss(batch)
            loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PermanentError(
                "export.recovery_diverged", f"the loss is {value} at step {self._step}: lower the rate"
            )
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return value

    def _rate(self) -> float:
        progress, warmup = (self._step + 1) / (self._steps + 1), self._training.warmup
        if progress < warmup:
            return self._training.peak_rate * progress / warmup
        return self._training.peak_rate * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Mean over all choices of the batch, nats."""
        with torch.autocast("cpu", torch.bfloat16):
            states = final_states(self._student, batch.ids)
            found = choice_log_probs(self._student, states, batch)  # (choices, widest)
            spoken = logits_at(self._student, states, batch.open_at)  # (tokens, vocab)
            taught = None if self._teacher is None else self._teacher.log_probs(batch)
        label = -found.gather(1, batch.target[:, None]).squeeze(1)  # (choices,)
        closed = label
        if taught is not None:
            share = torch.where(batch.labelled, self._training.label_share, 0.0)
            closed = share * label + (1 - share) * divergence(taught, found, batch)
        opened = torch.nn.functional.cross_entropy(spoken, batch.open_target, reduction="none")
        return torch.cat([closed, opened]).mean()

    def _save(self) -> None:
        state = {
            "key": self._key,
            "step": self._step,
            "steps": self._steps,
            "before": asdict(self._before) if self._before else None,
            "student": self._student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        temporary = self._state_file.with_suffix(".tmp")
        try:
            with temporary.open("wb") as writer:
                torch.save(state, writer)
                writer.flush()
                os.fsync(writer.fileno())
        except OSError as error:
            raise from_os_error(error, "saving the training's state") from error
        move_durable(temporary, self._state_file)

    def _resume(self) -> bool:
        if not self._state_file.is_file():
            return False
        try:
            state = torch.load(self._state_file, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            self._log("the saved state of a training is damaged: starting anew")
            return False
        if state.get("key") != self._key:
            self._log("the saved state is of another training: starting anew")
            return False
        self._student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self._steps = int(state["step"]), int(state["steps"])
        self._before = Fit(**state["before"]) if state["before"] else None
        self._log(f"resumed at step {self._step} of {self._steps}")
        return True


def _words(found: Fit) -> str:
    distance = "" if found.kl_nats is None else f", {found.kl_nats:.3f} nats from the teacher"
    return f"{found.right:.1%} of choices right{distance}"


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
