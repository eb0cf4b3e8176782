"""Answers in lanes are those of plain decoding, whatever is drafted, whoever shares the pass."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.document import read_document
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.runtime.decoder import CLOSE_CALL, Ask, Decoded, Drafts, Lane, decode
from edge_agent.runtime.drafts import NOTHING, AnswerDrafts, Guess, PassCost
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from edge_agent.runtime.kv_cache import MAX_SCORES, Logits, RowPass
from edge_agent.runtime.lanes import grouped, run_lanes
from tests.fakes import tokenizers
from tests.fakes.scoring_model import HashModel

VOCAB = 512
EOS = 1
START = 5
FAR = math.inf
CAPACITY = START + 400
PROPERTIES: dict[str, Any] = {
    "category": {"enum": ["thermal", "hydraulic", "hydro", "none"]},
    "urgent": {"type": "boolean"},
    "note": {"type": "string", "maxLength": 6},
    "count": {"type": "integer", "minimum": -3, "maximum": 40},
}


class HashRows:
    """Stands for `KvCache` over a `HashModel`: rows hold tokens, and scores follow from a row's tokens alone."""

    def __init__(self, rows: int, seed: int, *, broken_row: int | None = None, fails: EdgeError | None = None) -> None:
        self.capacity_tokens = CAPACITY
        self.rows = rows
        self.shared_passes = 0
        self._tokens: list[list[int]] = [[-1] * START for _ in range(rows)]
        self._model = HashModel(VOCAB, seed)
        self._broken_row = broken_row
        self._fails = fails

    def put(self, row: int, tokens: Sequence[int]) -> None:
        """As a restored beginning of an event would."""
        self._tokens[row] = [*self._tokens[row][:START], *tokens]

    def run(self, passes: Sequence[RowPass]) -> list[Logits]:
        assert [one.row for one in passes] == list(range(passes[0].row, passes[0].row + len(passes)))
        assert sum(len(one.score_at) for one in passes) <= MAX_SCORES
        if self._fails is not None:
            raise self._fails
        self.shared_passes += len(passes) > 1
        found = []
        for one in passes:
            assert START <= one.past <= len(self._tokens[one.row])
            assert list(one.score_at) == sorted(set(one.score_at))
            assert not one.follows or len(passes) == 1
            row = self._tokens[one.row] = [*self._tokens[one.row][: one.past], *one.tokens]
            texts = [[*row[START : one.past], *_way(one, at)] for at in one.score_at]
            scores = np.array([self._model.scores_after(text) for text in texts], np.float32)
            if one.row == self._broken_row:
                scores[:] = np.nan
            found.append(scores)
        return found


def _way(one: RowPass, at: int) -> list[int]:
    """Tokens of a pass that the one at offset ``at`` sees, itself included."""
    first = len(one.tokens) - len(one.follows)
    way: list[int] = []
    while at >= first:
        way.append(one.tokens[at])
        before = one.follows[at - first]
        at = first + before if before >= 0 else first - 1
    return [*one.tokens[: at + 1], *way[::-1]]


class WildDrafts:
    """Guesses at random, sometimes right: the worst that a memory could propose."""

    def __init__(self, seed: int, right: Sequence[int]) -> None:
        self._random = random.Random(seed)
        self._right = list(right)

    def propose(
        self,
        answer: Sequence[int],
        prompt: Sequence[int],
        ways: Sequence[Sequence[int]] = (),
        *,
        alternatives: bool,
        **_: object,
    ) -> Guess:
        length = self._random.randrange(12)
        rest = self._right[len(answer) :] if self._right[: len(answer)] == list(answer) else []
        draft = [
            rest[n] if n < len(rest) and self._random.random() < 0.8 else self._random.randrange(VOCAB)
            for n in range(length)
        ]
        follows = list(range(-1, length - 1))
        if alternatives:
            for place in range(length):
                if self._random.random() < 0.3:  # a tree, in which what was right before is mostly lost
                    follows[place] = self._random.randrange(-1, place)
            for number, way in enumerate(ways):  # behind it the ways on, of which one is right
                follows += [-1, *range(length, length + len(way) - 1)]
                draft += [token if self._random.random() < 0.9 else 0 for token in way]
                length = len(draft)
                if number == 0 and rest:
                    draft += rest[len(way) : len(way) + 5]
                    follows += range(length - 1, len(draft) - 1)
                    length = len(draft)
        asks = sorted(self._random.sample(range(length), self._random.randrange(length + 1)))
        return Guess(tuple(draft), tuple(follows), tuple(asks))


class Nothing:
    """Never guesses."""

    def propose(self, *_: object, **__: object) -> Guess:
        return NOTHING


def unlearned() -> AnswerDrafts:
    """Knows what may be answered, and remembers nothing."""
    return AnswerDrafts(PassCost(), remembers=False)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> AnswerPlan:
    return plan_of(PROPERTIES, tmp_path_factory.mktemp("tokenizer"))


def plan_of(properties: dict[str, Any], folder: Path) -> AnswerPlan:
    file: Path = tokenizers.byte_level(folder / "tokenizer.json")
    encoder = TextEncoder(file, VOCAB)
    task = read_document(
        TaskSpec,
        {
            "name": "task",
            "version": 1,
            "prompt": {"prefix": "p", "event": [{"field": "text", "label": "text"}]},
            "output": {"type": "object", "properties": properties},
        },
    )
    return compile_plan(task, encoder, lambda: GuidedGrammars(encoder, VOCAB, EOS))


def plainly(plan: AnswerPlan, prompt: Sequence[int], seed: int) -> Decoded:
    return decode(HashModel(VOCAB, seed), plan, prompt, {}, FAR)


def essence(decoded: Decoded | None) -> tuple[Any, ...]:
    assert decoded is not None
    return decoded.values, decoded.confidence, decoded.tokens, decoded.asked


prompts = st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(prompts, min_size=1, max_size=4),
    seed=st.integers(0, 99),
    wild=st.booleans(),
    alternatives=st.booleans(),
)
def test_neither_drafts_nor_company_nor_a_restored_beginning_change_an_answer(
    plan: AnswerPlan, texts: list[list[int]], seed: int, *, wild: bool, alternatives: bool
) -> None:
    expected = [plainly(plan, text, seed) for text in texts]
    cache, lanes = HashRows(len(texts), seed), []
    for row, (text, answer) in enumerate(zip(texts, expected, strict=True)):
        seen = seed % len(text)
        cache.put(row, text[:seen])
        drafts: Drafts | None = WildDrafts(seed + row, answer.tokens) if wild else None
        lanes.append(Lane(plan, text, {}, FAR, drafts, room_tokens=CAPACITY - START, seen=seen))
    assert run_lanes(cache, START, lanes, PassCost(), alternatives=alternatives) == [None] * len(texts)
    assert [essence(lane.decoded) for lane in lanes] == [essence(answer) for answer in expected]


def test_a_right_guess_is_checked_in_one_pass(plan: AnswerPlan) -> None:
    prompt, drafts = [7, 8, 9], AnswerDrafts(PassCost())
    expected = plainly(plan, prompt, 3)
    for _ in range(9):
        drafts.learn(expected.tokens, expected.asked)
    lane = Lane(plan, prompt, {}, FAR, drafts, room_tokens=CAPACITY - START)
    run_lanes(HashRows(1, 3), START, [lane], PassCost())
    assert essence(lane.decoded) == essence(expected)
    assert lane.passes == 1 < expected.passes


@pytest.mark.parametrize("seed", range(12))
def test_both_ways_of_a_yes_or_no_are_tried_in_one_pass(tmp_path: Path, seed: int) -> None:
    plan = plan_of({"a": {"type": "boolean"}, "b": {"type": "boolean"}, "c": {"type": "boolean"}}, tmp_path)
    prompt = [7, 8, 9, seed + 2]
    expected = plainly(plan, prompt, seed)
    passes = {}
    for alternatives in (False, True):
        lane = Lane(plan, prompt, {}, FAR, unlearned() if alternatives else Nothing(), room_tokens=CAPACITY - START)
        cache = HashRows(1, seed)
        assert run_lanes(cache, START, [lane], PassCost(), alternatives=alternatives) == [None]
        assert essence(lane.decoded) == essence(expected)
        passes[alternatives] = lane.passes
    assert passes == {False: 3, True: 2}


def test_a_guess_that_the_memory_has_no_room_for_is_cut_to_what_fits(plan: AnswerPlan) -> None:
    prompt = [7, 8, 9]
    expected = plainly(plan, prompt, 3)
    for room_tokens in range(len(prompt) + len(plan.opening), len(prompt) + len(expected.tokens) + 9, 3):
        drafts = WildDrafts(room_tokens, expected.tokens)
        lane = Lane(plan, prompt, {}, FAR, drafts, room_tokens=room_tokens)
        asked = lane.ask()
        assert asked.keep + len(asked.tokens) <= room_tokens
        assert max(asked.score_at) < len(asked.tokens)


class AsksForCompany:
    """Never guesses, and remembers how many answers it was to guess together with."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def propose(self, *_: object, company: int = 1, **__: object) -> Guess:
        self.seen.append(company)
        return NOTHING


def test_a_guess_is_told_how_many_answers_are_still_missing(plan: AnswerPlan) -> None:
    drafts = [AsksForCompany() for _ in range(3)]
    deadlines = [FAR, FAR, time.monotonic()]
    lanes = [Lane(plan, [20 + n, 3], {}, deadlines[n], drafts[n]) for n in range(3)]
    run_lanes(HashRows(3, 1), START, lanes, PassCost(), alternatives=True)
    assert [one.seen[0] for one in drafts[:2]] == [3, 3]
    assert {one.seen[-1] for one in drafts[:2]} <= {1, 2}


def test_short_passes_are_shared(plan: AnswerPlan) -> None:
    cache = HashRows(4, 1)
    lanes = [Lane(plan, [20 + row, 3, 4], {}, FAR) for row in range(4)]
    run_lanes(cache, START, lanes, PassCost())
    assert cache.shared_passes > 0


def test_one_event_s_fault_is_no_other_s(plan: AnswerPlan) -> None:
    texts = [[7, 8], [9, 10], [11, 12]]
    lanes = [Lane(plan, text, {}, FAR) for text in texts]
    faults = run_lanes(HashRows(3, 5, broken_row=1), START, lanes, PassCost())
    assert faults[1] is not None
    assert faults[1].code == "worker.bad_logits"
    assert [faults[0], faults[2]] == [None, None]
    assert [essence(lanes[n].decoded) for n in (0, 2)] == [essence(plainly(plan, texts[n], 5)) for n in (0, 2)]


def test_a_lane_past_its_deadline_ends_and_the_others_go_on(plan: AnswerPlan) -> None:
    lanes = [Lane(plan, [7, 8], {}, time.monotonic()), Lane(plan, [9, 10], {}, FAR)]
    faults = run_lanes(HashRows(2, 5), START, lanes, PassCost())
    assert faults[0] is not None
    assert faults[0].code == "worker.deadline"
    assert essence(lanes[1].decoded) == essence(plainly(plan, [9, 10], 5))


def test_a_pass_that_fails_fails_every_event_in_it(plan: AnswerPlan) -> None:
    fault = PermanentError("worker.inference", "kernel")
    lanes = [Lane(plan, [7, 8], {}, FAR), Lane(plan, [9, 10], {}, FAR)]
    assert run_lanes(HashRows(2, 5, fails=fault), START, lanes, PassCost()) == [fault, fault]


def ask(tokens: int, keep: int = 0, scores: int = 1) -> Ask:
    return Ask(keep, [1] * tokens, list(range(scores)))


def sizes(waiting: list[tuple[int, Ask]], fixed: float = 10, room: int = 400) -> list[list[int]]:
    return [[row for row, _ in group] for group in grouped(waiting, fixed, room)]


def test_padding_that_costs_more_than_a_pass_keeps_rows_apart() -> None:
    assert sizes([(0, ask(7)), (1, ask(7)), (2, ask(60)), (3, ask(7))]) == [[0, 1], [2], [3]]
    assert sizes([(0, ask(50)), (1, ask(55)), (2, ask(52))]) == [[0, 1, 2]]


def test_rows_that_do_not_lie_side_by_side_share_no_pass() -> None:
    assert sizes([(0, ask(7)), (2, ask(7)), (3, ask(7))]) == [[0], [2, 3]]


def test_a_row_near_its_end_is_not_padded_beyond_it() -> None:
    assert sizes([(0, ask(2, keep=397)), (1, ask(7))], room=400) == [[0], [1]]
    assert sizes([(0, ask(2, keep=393)), (1, ask(7))], room=400) == [[0, 1]]


def test_a_pass_scores_no_more_positions_than_there_is_room_for() -> None:
    waiting = [(row, ask(60, scores=50)) for row in range(4)]
    assert sizes(waiting) == [[0, 1], [2, 3]]


class TwoWays:
    """Guesses both ways of a choice, the wrong one first, and what would follow each."""

    def __init__(self, wrong: Sequence[int], right: Sequence[int]) -> None:
        self._wrong, self._right = wrong, right

    def propose(self, *_: object, **__: object) -> Guess:
        tokens = (*self._wrong, *self._right)
        follows = (*range(-1, len(self._wrong) - 1), -1, *range(len(self._wrong), len(tokens) - 1))
        return Guess(tokens, follows, (len(self._wrong) - 1, len(tokens) - 1))


@pytest.mark.parametrize("margin", [CLOSE_CALL * 0.9, CLOSE_CALL * 1.1], ids=["close", "clear"])
def test_what_a_guess_out_of_line_would_decide_by_a_hair_is_asked_again(tmp_path: Path, margin: float) -> None:
    plan = plan_of({"first": {"type": "boolean"}, "second": {"enum": ["x", "y"]}}, tmp_path)
    first, second = plan.fields
    assert isinstance(first, ClosedField)
    assert isinstance(second, ClosedField)
    assert isinstance(first.root, Branch)
    assert isinstance(second.root, Branch)
    ways = [
        (int(token), *edge.forced, *second.forced) for token, edge in zip(first.root.ids, first.root.edges, strict=True)
    ]
    lane = Lane(plan, [7, 8], {}, FAR, TwoWays(ways[0], ways[1]), room_tokens=200)
    ask = lane.ask(alternatives=True)
    scores = np.zeros((len(ask.score_at), VOCAB), np.float32)
    scores[0, first.root.ids[1]] = 9.0  # the second way comes true, and lies behind the other
    scores[2, second.root.ids[0]] = margin
    lane.take(ask, scores)
    assert (lane.decoded is not None) is (margin > CLOSE_CALL)
    if lane.decoded is None:
        again = lane.ask()
        assert tuple(again.tokens[: len(ways[1])]) == ways[1], "run once more, in line"
        assert again.score_at[0] == len(ways[1]) - 1
