"""From a prompt to a schema-valid answer in as few passes as there are surprises.

`answer_steps` is the rule alone: it says which tokens are known, is told the scores after them, chooses among what the
grammar allows, and goes on. It does not know how the scores come about. A `Lane` brings them: a pass takes everything
that is known but not yet seen by the model (the event at first, later the chosen token with all that it forces) and,
where the graph scores several positions, a guess at what will follow, perhaps several side by side. A guess is only
ever checked: scores count while the tokens before them are the chosen ones, so that a right guess saves passes and a
wrong one costs tokens, and neither changes an answer. The last field's closing tokens are never run.
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
from edge_agent.runtime.drafts import NOTHING, Guess
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, PlannedField, Tokens, Value
from edge_agent.runtime.guided import GuidedField

Scores = NDArray[np.float32]
Steps = Generator["Known", Scores, "Decoded"]
CLOSE_CALL = 1 / 8
"""Logits. Sums in another order, rounded to eight bits layer by layer, were seen to move a choice by 0.1."""
MAX_WAYS = 4
"""Ways on from a choice that are told: of more, each is too unlikely to be tried unseen."""


class Forward(Protocol):
    """One pass of a model with a memory of what came before."""

    def forward(self, tokens: Sequence[int]) -> Scores:
        """Append tokens (ids); returns the scores after the last one, float32 (rows,)."""


class Drafts(Protocol):
    """Guesses what follows."""

    def propose(
        self,
        answer: Sequence[int],
        prompt: Sequence[int],
        ways: Sequence[Sequence[int]] = (),
        *,
        alternatives: bool,
        company: int = 1,
    ) -> Guess:
        """As `AnswerDrafts.propose`."""


@dataclass(frozen=True)
class Known:
    """How far a text is known.

    Args:
        tokens: ids, prompt included; the same list each time, and longer.
        rows: of the scores, those of the tokens that may follow, int64 (options,).
        ways: tokens that each way on would add, up to the next choice; those that are told.
    """

    tokens: list[int]
    rows: NDArray[np.int64]
    ways: tuple[Tokens, ...] = ()


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
        follows: of the last tokens, where they do not simply follow one another: for each the place among them of the
            token that it follows, -1 for what stands before them.
    """

    keep: int
    tokens: list[int]
    score_at: list[int]
    follows: tuple[int, ...] = ()


def answer_steps(plan: AnswerPlan, prompt: Sequence[int], temperatures: Mapping[str, float]) -> Steps:
    """The rule of an answer.

    Args:
        plan: the task's decisions.
        prompt: token ids of the event.
        temperatures: calibration per field.

    Yields:
        How far the text is known. Scores after the last token, float32 (rows,), are to be sent.

    Returns:
        The answer; valid by construction.

    Raises:
        PermanentError: ``worker.bad_logits``, ``worker.grammar``.
    """
    tokens = [*prompt, *plan.opening]
    asked: list[int] = []
    values: dict[str, Value] = {}
    confidence: dict[str, float] = {}
    for place, planned in enumerate(plan.fields):
        temperature = temperatures.get(planned.name, 1.0)
        if isinstance(planned, ClosedField):
            behind = _forced_behind(plan.fields[place + 1 :])
            value, probability = yield from _closed(tokens, planned, behind, temperature, asked)
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
        self._known = Known([], np.empty(0, np.int64))
        self._advance(None)

    @property
    def decoded(self) -> Decoded | None:
        """The answer; None while something is left to be chosen."""
        return self._finished

    def ask(self, *, alternatives: bool = False, company: int = 1) -> Ask:
        """What the next pass must hold.

        Args:
            alternatives: whether it may hold several guesses at the same token.
            company: lanes that are to be answered together, this one included.

        Raises:
            PermanentError: ``worker.deadline``.
        """
        if time.monotonic() >= self._deadline_at_s:
            raise PermanentError("worker.deadline", f"deadline passed after {self.passes} passes", passes=self.passes)
        known = self._known.tokens
        # At least one token is run, because scores come of running.
        keep = min(_shared(self._fed, known), len(known) - 1)
        guess = NOTHING
        if self._drafts is not None:
            answer = known[len(self._prompt) :]
            ways = self._known.ways
            guess = self._drafts.propose(answer, self._prompt, ways, alternatives=alternatives, company=company)
            guess = guess.first(max(0, self._room_tokens - len(known)))
        first = len(known) - keep  # offset of the guess
        return Ask(
            keep,
            [*known[keep:], *guess.tokens],
            [first - 1, *(first + at for at in guess.asks)],
            guess.follows if guess.has_alternatives else (),
        )

    def take(self, ask: Ask, scores: Scores) -> None:
        """Go on as far as the scores of a pass reach.

        A guess that another one lies before has its keys and values elsewhere than the same text without a guess would,
        and its sums are in another order. So its tokens are run again with whatever is run next, and its scores count
        only where they are far from a tie.

        Args:
            ask: what the pass held.
            scores: float32 (len(ask.score_at), rows).

        Raises:
            PermanentError: ``worker.bad_logits``, ``worker.grammar``.
        """
        self.passes += 1
        by_offset = dict(zip(ask.score_at, scores, strict=True))
        first = at = ask.score_at[0]  # the last token that was known
        follows = ask.follows or range(-1, len(ask.tokens) - first - 2)
        # Where the text may go on: (offset of a token, the token after it) -> offset of that one.
        steps = {
            (first + 1 + before, ask.tokens[first + 1 + place]): first + 1 + place
            for place, before in enumerate(follows)
        }
        known = walked = in_line = len(self._known.tokens)
        while self._finished is None and at in by_offset:
            if walked > in_line and self._is_close(by_offset[at]):
                break
            self._advance(by_offset[at])
            tokens = self._known.tokens
            while walked < len(tokens) and (at, tokens[walked]) in steps:
                at = steps[at, tokens[walked]]
                walked += 1
                if at - first == walked - known:
                    in_line = walked
            if walked < len(tokens):
                break  # the text went another way than any guess
        self._fed = self._known.tokens[:in_line]

    def _is_close(self, scores: Scores) -> bool:
        """Whether the two likeliest of the tokens that may follow are about as likely."""
        rows = self._known.rows
        if len(rows) == 1:
            return False
        runner_up, best = np.partition(scores[rows], -2)[-2:]
        return bool(best - runner_up < CLOSE_CALL)

    def _advance(self, scores: Scores | None) -> None:
        try:
            self._known = next(self._steps) if scores is None else self._steps.send(scores)
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
    tokens: list[int], planned: ClosedField, behind: Tokens | None, temperature: float, asked: list[int]
) -> Generator[Known, Scores, tuple[Value, float]]:
    tokens.extend(planned.forced)
    node = planned.root
    probability = 1.0
    while isinstance(node, Branch):
        asked.append(len(tokens))
        position, share = choose((yield Known(tokens, node.rows, _ways(node, behind))), node.rows, temperature)
        edge = node.edges[position]
        probability *= share
        tokens.append(int(node.ids[position]))
        tokens.extend(edge.forced)
        node = edge.target
    return node.value, probability


def _forced_behind(fields: Sequence[PlannedField]) -> Tokens | None:
    """What the next fields force up to the next choice; None where there is none, or nobody knows before."""
    forced: Tokens = ()
    for planned in fields:
        if not isinstance(planned, ClosedField):
            return None
        forced += planned.forced
        if isinstance(planned.root, Branch):
            return forced
    return None


def _ways(branch: Branch, behind: Tokens | None) -> tuple[Tokens, ...]:
    """The ways on from a choice, each up to the next one."""
    if len(branch.edges) > MAX_WAYS:
        return ()
    return tuple(
        (token, *edge.forced, *(() if isinstance(edge.target, Branch) else behind or ()))
        for token, edge in zip(branch.ids.tolist(), branch.edges, strict=True)
        if isinstance(edge.target, Branch) or behind is not None
    )


def _guided(
    tokens: list[int], planned: GuidedField, temperature: float, asked: list[int]
) -> Generator[Known, Scores, tuple[Value, float]]:
    grammar = planned.start()
    probability = 1.0
    while True:
        tokens.extend(grammar.forced())
        if grammar.finished():
            return grammar.value(), probability
        ids = grammar.allowed()
        asked.append(len(tokens))
        rows = grammar.rows(ids)
        position, share = choose((yield Known(tokens, rows)), rows, temperature)
        probability *= share
        grammar.choose(int(ids[position]))
        tokens.append(int(ids[position]))


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the beginning that two texts share."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
