"""What a smaller model learns from: events of the task, encoded as on the device, with the choices it must make.

On the device an answer is a walk through a plan (`edge_agent.runtime.grammar`): most tokens are forced, and at a
choice only the allowed tokens compete. So only choices are lessons, and only against their rivals: a loss on keys,
punctuation or the rest of the vocabulary would spend a small model on what it is never asked.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_agent.contract.event import Event, check_event
from edge_agent.contract.output import TextField
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, Done, compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from edge_agent.runtime.prompt import event_prompt
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint


@dataclass(frozen=True)
class Row:
    """One event of the training file.

    Args:
        event: as on the device.
        decision: the right answer; None where nobody gave one.
    """

    event: Event
    decision: dict[str, Any] | None


@dataclass(frozen=True)
class Point:
    """One choice of an answer.

    Args:
        at: index in the lesson's ids of the token that was chosen.
        allowed: ids that may stand there, ascending; empty where the whole vocabulary may (open fields).
    """

    at: int
    allowed: tuple[int, ...]


@dataclass(frozen=True)
class Lesson:
    """One answered event.

    Args:
        ids: prefix, event and answer.
        points: the answer's choices.
        labelled: whether a person (or a rule) gave the answer, and not the teacher.
    """

    ids: tuple[int, ...]
    points: tuple[Point, ...]
    labelled: bool


@dataclass(frozen=True)
class Batch:
    """Right-padded lessons with their choices side by side.

    Args:
        numbers: which lessons these are.
        ids: int64 (rows, length); what follows a lesson's last choice is left out, for nothing depends on it.
        spans: first and last + 1 closed choice of each lesson.
        at: int64 (2, choices): row and position whose logits decide a closed choice.
        allowed: int64 (choices, widest); what is beyond the choice's options repeats the first.
        is_option: bool (choices, widest).
        target: int64 (choices,): the chosen option.
        labelled: bool (choices,).
        open_at: int64 (2, tokens): row and position before each token of an open field.
        open_target: int64 (tokens,): that token.
    """

    numbers: tuple[int, ...]
    ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    at: torch.Tensor
    allowed: torch.Tensor
    is_option: torch.Tensor
    target: torch.Tensor
    labelled: torch.Tensor
    open_at: torch.Tensor
    open_target: torch.Tensor


class LessonWriter:
    """Encodes events and answers exactly as the engine does.

    Args:
        checkpoint: for its tokenizer and special tokens.
        task: the task.

    Raises:
        PermanentError: ``bundle.unsupported`` when the tokenizer cannot spell the task's answers.
    """

    def __init__(self, checkpoint: Checkpoint, task: TaskSpec) -> None:
        self.task = task
        encoder = TextEncoder(checkpoint.path / TOKENIZER_NAME, checkpoint.vocab_size)
        self._encode = encoder.encode
        start = [] if checkpoint.bos_token_id is None else [checkpoint.bos_token_id]
        self._prefix = [*start, *self._encode(task.prompt.prefix)]
        self.plan: AnswerPlan = compile_plan(
            task, encoder, lambda: GuidedGrammars(encoder, checkpoint.vocab_size, checkpoint.eos_token_id)
        )
        self._paths = [_paths(planned) if isinstance(planned, ClosedField) else {} for planned in self.plan.fields]

    def prompt(self, event: Event) -> list[int]:
        """Token ids of prefix and event.

        Raises:
            RefusedError: ``event.*``.
        """
        return [*self._prefix, *event_prompt(self.task, event, self._encode).ids]

    def lesson(self, row: Row, answer: dict[str, Any]) -> Lesson:
        """Write one lesson.

        Args:
            row: the event; whether it had a decision says whether the answer is a label.
            answer: the answer to learn.

        Raises:
            RefusedError: ``event.*``.
        """
        ids = [*self.prompt(row.event), *self.plan.opening]
        points: list[Point] = []
        for field, planned, paths in zip(self.task.output_fields, self.plan.fields, self._paths, strict=True):
            if isinstance(planned, ClosedField):
                steps = paths[answer[field.name]]
            else:
                steps = self._open_steps(answer[field.name], planned.after, quoted=isinstance(field, TextField))
            for token, allowed in steps:
                if allowed is not None:
                    points.append(Point(len(ids), allowed))
                ids.append(token)
        return Lesson(tuple(ids), tuple(points), row.decision is not None)

    def _open_steps(self, value: Any, after: str, *, quoted: bool) -> list[_Step]:
        spelled = json.dumps(value, ensure_ascii=False)
        first, *rest = self._encode(after)
        # The first token after the value is a choice too: it is where the model stops.
        chosen = [*self._encode(spelled[1:-1] if quoted else spelled), first]
        return [*((token, ()) for token in chosen), *((token, None) for token in rest)]


_Step = tuple[int, tuple[int, ...] | None]
"""A token of an answer and what else might have stood there; None where it was forced."""


def _paths(field: ClosedField) -> dict[Any, list[_Step]]:
    """The way to every value of a closed field."""
    found: dict[Any, list[_Step]] = {}

    def walk(node: Branch | Done, steps: list[_Step]) -> None:
        if isinstance(node, Done):
            found[node.value] = steps
            return
        options = tuple(int(token) for token in node.ids)
        for token, edge in zip(options, node.edges, strict=True):
            forced: list[_Step] = [(after, None) for after in edge.forced]
            walk(edge.target, [*steps, (token, options), *forced])

    walk(field.root, [(token, None) for token in field.forced])
    return found


def read_rows(path: Path, task: TaskSpec) -> list[Row]:
    """Read JSON lines of ``{"event": {...}, "decision": {...}}``; the decision may be missing or null.

    Raises:
        PermanentError: ``export.data_unreadable`` or ``export.data_invalid`` with the line number.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError("export.data_unreadable", f"cannot read {path}: {error}") from error
    rows = [_row(line, f"{path.name} line {n}", task) for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise PermanentError("export.data_invalid", f"{path.name} holds no event")
    return rows


def _row(line: str, where: str, task: TaskSpec) -> Row:
    try:
        parsed = json.loads(line)
        event, decision = check_event(parsed["event"]), parsed.get("decision")
        problems = [] if decision is None else task.check_decision(dict(decision))
    except (ValueError, KeyError, TypeError, AttributeError, EdgeError) as error:
        raise PermanentError("export.data_invalid", f"{where}: {error}") from error
    if problems:
        raise PermanentError("export.data_invalid", f"{where}: {'; '.join(problems)}")
    return Row(event, decision)


def digest_of(lessons: Sequence[Lesson]) -> str:
    """Hex SHA-256 of what is taught, to tell one course from another."""
    digest = hashlib.sha256()
    for lesson in lessons:
        digest.update(repr((lesson.ids, [point.at for point in lesson.points], lesson.labelled)).encode())
    return digest.hexdigest()


def batches(lessons: Sequence[Lesson], rng: random.Random, *, tokens: int) -> Iterator[Batch]:
    """Every lesson once, in batches of similar length and about ``tokens`` ids, in random order.

    The number of batches depends on the lessons' lengths alone, so that a step's number says which batch it took.
    """
    numbers = list(range(len(lessons)))
    rng.shuffle(numbers)
    numbers.sort(key=lambda number: len(lessons[number].ids))
    groups: list[list[int]] = [[]]
    for number in numbers:
        if groups[-1] and (len(groups[-1]) + 1) * len(lessons[number].ids) > tokens:
            groups.append([])
        groups[-1].append(number)
    rng.shuffle(groups)
    # One width for all batches of a task, so that a teacher's answers fit whichever batch a lesson is in.
    widest = max((len(point.allowed) for lesson in lessons for point in lesson.points), default=0)
    for group in groups:
        yield _batch([lessons[number] for number in group], tuple(group), max(1, widest))


def _batch(lessons: Sequence[Lesson], numbers: tuple[int, ...], widest: int) -> Batch:
    read = [lesson.ids[: lesson.points[-1].at] if lesson.points else lesson.ids for lesson in lessons]
    ids = torch.zeros((len(lessons), max(map(len, read))), dtype=torch.int64)
    spans: list[tuple[int, int]] = []
    closed: list[tuple[int, int]] = []
    allowed: list[tuple[int, ...]] = []
    targets: list[int] = []
    labelled: list[bool] = []
    open_places: list[tuple[int, int]] = []
    open_targets: list[int] = []
    for row, lesson in enumerate(lessons):
        ids[row, : len(read[row])] = torch.tensor(read[row])
        begin = len(closed)
        for point in lesson.points:
            if not point.allowed:
                open_places.append((row, point.at - 1))
                open_targets.append(lesson.ids[point.at])
                continue
            closed.append((row, point.at - 1))
            allowed.append(point.allowed)
            targets.append(point.allowed.index(lesson.ids[point.at]))
            labelled.append(lesson.labelled)
        spans.append((begin, len(closed)))
    options = torch.tensor([[*o, *([o[0]] * (widest - len(o)))] for o in allowed], dtype=torch.int64)
    counts = torch.tensor([len(o) for o in allowed], dtype=torch.int64)
    return Batch(
        numbers=numbers,
        ids=ids,
        spans=tuple(spans),
        at=torch.tensor(closed, dtype=torch.int64).reshape(-1, 2).T,
        allowed=options.reshape(-1, widest),
        is_option=torch.arange(widest) < counts[:, None],
        target=torch.tensor(targets, dtype=torch.int64),
        labelled=torch.tensor(labelled, dtype=torch.bool),
        open_at=torch.tensor(open_places, dtype=torch.int64).reshape(-1, 2).T,
        open_target=torch.tensor(open_targets, dtype=torch.int64),
    )
