"""From a prompt to a schema-valid answer in as few passes as there are surprises.

`answer_steps` is the rule alone: it says which tokens are known, is told the scores after them, chooses among what the
grammar allows, and goes on. It does not know how the scores come about. A `Lane` brings them: a pass takes everything
that is known but not yet seen by the model (the event at first, later the chosen token with all that it forces) and,
where the graph scores several positions, a draft of what will probably follow. A draft is only ever checked: scores
count while the tokens before them are the chosen ones, so that a right guess saves passes and a wrong one costs tokens,
and neither changes an answer. The last field's closing tokens are never run.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import PermanentError
from edge_agent.runtime.confidence import choose
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, Value
from edge_agent.runtime.guided import GuidedField

Scores = NDArray[np.float32]
Steps = Generator[list[int], Scores, "Decoded"]


class Forward(Protocol):
    """One pass of a model with a memory of what came before."""

    def forward(self, tokens: Sequence[int]) -> Scores:
        """Append tokens (ids); returns the scores after the last one, float32 (rows,)."""


class Drafts(Protocol):
    """Guesses what follows."""

    def propose(self, answer: Sequence[int], prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens that may follow ``answer``, and after how many of them scores will be asked for, ascending."""


@dataclass(frozen=True)
class Decoded:
    """An answer as the model gave it.

    Args:
        values: field to value, in schema order.
        confidence: field to probability of its value.
        tokens: ids of the whole answer, chosen and forced.
        asked: numbers of answer tokens after which scores were asked for, ascending.
        passes: forward passes used.
    """

    values: dict[str, Value]
    confidence: dict[str, float]
    tokens: list[int]
    asked: tuple[int, ...]
    passes: int = 0


@dataclass(frozen=True)
class Ask:
    """What a lane needs of the model.

    Args:
        keep: tokens behind the prefix that the model has seen and that still hold.
        tokens: what it is to see next, a draft at the end.
        score_at: offsets into ``tokens`` after which scores are wanted, ascending.
    """

    keep: int
    tokens: list[int]
    score_at: list[int]


def answer_steps(plan: AnswerPlan, prompt: Sequence[int], temperatures: Mapping[str, float]) -> Steps:
    """The rule of an answer.

    Args:
        plan: the task's decisions.
        prompt: token ids of the event.
        temperatures: calibration per field.

    Yields:
        All tokens that are known, prompt included; the same list, longer each time. Scores after the last of them,
        float32 (rows,), are to be sent.

    Returns:
        The answer; valid by construction.

    Raises:
        PermanentError: ``worker.bad_logits``, ``worker.grammar``.
    """
    tokens = [*prompt, *plan.opening]
    asked: list[int] = []
    values: dict[str, Value] = {}
    confidence: dict[str, float] = {}
    for planned in plan.fields:
        temperature = temperatures.get(planned.name, 1.0)
        if isinstance(planned, ClosedField):
            value, probability = yield from _closed(tokens, planned, temperature, asked)
        else:
            value, probability = yield from _guided(tokens, planned, temperature, asked)
        values[planned.name], confidence[planned.name] = value, probability
    start = len(prompt)
    return Decoded(values, confidence, tokens[start:], tuple(end - start for end in asked))


class Lane:
    """One answer in the making.

    Args:
        plan: the task's decisions.
        prompt: token ids of the event.
        temperatures: calibration per field.
        deadline_at_s: `time.monotonic` after which no further pass begins.
        drafts: guesses what follows; None where the model scores only the end of a pass.
        room_tokens: that the model's memory has for prompt and answer; a draft must fit as well.
        seen: tokens of ``prompt`` that the model's memory holds already, fewer than all.

    Attributes:
        passes: forward passes that the answer took.
    """

    def __init__(
        self,
        plan: AnswerPlan,
        prompt: Sequence[int],
        temperatures: Mapping[str, float],
        deadline_at_s: float,
        drafts: Drafts | None = None,
        *,
        room_tokens: int = 0,
        seen: int = 0,
    ) -> None:
        self.passes = 0
        self._room_tokens = room_tokens
        self._prompt = list(prompt)
        self._deadline_at_s = deadline_at_s
        self._drafts = drafts
        self._fed: list[int] = self._prompt[:seen]
        self._finished: Decoded | None = None
        self._steps = answer_steps(plan, prompt, temperatures)
        self._tokens: list[int] = []
        self._advance(None)

    @property
    def decoded(self) -> Decoded | None:
        """The answer; None while something is left to be chosen."""
        return self._finished

    def ask(self) -> Ask:
        """What the next pass must hold.

        Raises:
            PermanentError: ``worker.deadline``.
        """
        if time.monotonic() >= self._deadline_at_s:
            raise PermanentError("worker.deadline", f"deadline passed after {self.passes} passes", passes=self.passes)
        known = self._tokens
        # At least one token is run, because scores come of running.
        keep = min(_shared(self._fed, known), len(known) - 1)
        draft: list[int] = []
        draft_asks: list[int] = []
        if self._drafts is not None:
            draft, draft_asks = self._drafts.propose(known[len(self._prompt) :], self._prompt)
            draft = draft[: max(0, self._room_tokens - len(known))]
            draft_asks = [at for at in draft_asks if at <= len(draft)]
        last = len(known) - keep - 1
        return Ask(keep, [*known[keep:], *draft], [last, *(last + at for at in draft_asks)])

    def take(self, ask: Ask, scores: Scores) -> None:
        """Go on as far as the scores of a pass reach.

        Args:
            ask: what the pass held.
            scores: float32 (len(ask.score_at), rows).

        Raises:
            PermanentError: ``worker.bad_logits``, ``worker.grammar``.
        """
        self.passes += 1
        self._fed = [*self._fed[: ask.keep], *ask.tokens]
        by_length = {ask.keep + at + 1: row for at, row in zip(ask.score_at, scores, strict=True)}
        while self._finished is None:
            known = len(self._tokens)
            # What was drafted otherwise than it was chosen has scores of another text.
            if known not in by_length or self._fed[:known] != self._tokens:
                return
            self._advance(by_length[known])

    def _advance(self, scores: Scores | None) -> None:
        try:
            self._tokens = next(self._steps) if scores is None else self._steps.send(scores)
        except StopIteration as finished:
            self._finished = replace(finished.value, passes=self.passes)


def decode(
    model: Forward,
    plan: AnswerPlan,
    prompt: Sequence[int],
    temperatures: Mapping[str, float],
    deadline_at_s: float,
) -> Decoded:
    """Answer a prompt with a model that scores the end of each pass, and nothing else.

    Args:
        model: its memory holds the task's prefix.
        plan: the task's decisions.
        prompt: token ids of the event.
        temperatures: calibration per field.
        deadline_at_s: `time.monotonic` after which no further pass begins.

    Returns:
        The answer; valid by construction.

    Raises:
        PermanentError: ``worker.deadline``, ``worker.bad_logits``, or what the model raises.
    """
    lane = Lane(plan, prompt, temperatures, deadline_at_s)
    while (decoded := lane.decoded) is None:
        ask = lane.ask()
        lane.take(ask, model.forward(ask.tokens)[None])
    return decoded


def _closed(
    tokens: list[int], planned: ClosedField, temperature: float, asked: list[int]
) -> Generator[list[int], Scores, tuple[Value, float]]:
    tokens.extend(planned.forced)
    node = planned.root
    probability = 1.0
    while isinstance(node, Branch):
        asked.append(len(tokens))
        position, share = choose((yield tokens), node.rows, temperature)
        edge = node.edges[position]
        probability *= share
        tokens.append(int(node.ids[position]))
        tokens.extend(edge.forced)
        node = edge.target
    return node.value, probability


def _guided(
    tokens: list[int], planned: GuidedField, temperature: float, asked: list[int]
) -> Generator[list[int], Scores, tuple[Value, float]]:
    grammar = planned.start()
    probability = 1.0
    while True:
        tokens.extend(grammar.forced())
        if grammar.finished():
            return grammar.value(), probability
        ids = grammar.allowed()
        asked.append(len(tokens))
        position, share = choose((yield tokens), grammar.rows(ids), temperature)
        probability *= share
        grammar.choose(int(ids[position]))
        tokens.append(int(ids[position]))


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the beginning that two texts share."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
