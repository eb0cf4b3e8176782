"""The benchmark's engine answers what it is told, by passes of its own: else something else would be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError
from edge_agent.runtime.bundle import VerifiedBundle, open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.head_rows import HeadRows
from edge_agent.runtime.kv_cache import RowPass
from edge_agent.runtime.speed import PLAIN, Speed
from tests.bench.decision_task import plant_events
from tests.bench.dictated import CERTAIN, DictatedEngine, Dictation, key_of, spelled

# A guard of the task would have its say on the other machine's.
EVENTS = [event for event in plant_events(40) if event["machine"] != "cell-6"]
# Not what the model would say, and not twice the same.
DECISIONS: list[dict[str, Any]] = [
    {
        "category": ("network", "material", "safety")[number % 3],
        "severity": ("info", "critical")[number % 2],
        "action": ("log", "stop", "call", "monitor")[number % 4],
        "escalate": number % 5 == 0,
        "component": ("curtain", "unknown", "feeder")[number % 3],
    }
    for number in range(len(EVENTS))
]
TOLD = {key_of(event): decision for event, decision in zip(EVENTS, DECISIONS, strict=True)}


@pytest.fixture
def bundle(reference_bundle: Path, reference_digest: str) -> VerifiedBundle:
    return open_installed_bundle(reference_bundle, reference_digest)


@pytest.mark.parametrize("speed", [PLAIN, Speed(together=1), Speed()], ids=["plain", "guesses", "rows together"])
def test_the_engine_answers_what_it_is_told_whatever_it_guesses(bundle: VerifiedBundle, speed: Speed) -> None:
    engine = DictatedEngine(bundle, 1, speed, TOLD)
    for _ in range(2):  # the second time with guesses that are mostly right
        answers = engine.decide_many("triage", EVENTS, deadline_s=60.0)
        assert [not isinstance(one, EdgeError) and one.decision for one in answers] == DECISIONS


def test_an_engine_that_answers_otherwise_is_not_measured(bundle: VerifiedBundle) -> None:
    engine = DictatedEngine(bundle, 1, PLAIN, {**TOLD, key_of(EVENTS[0]): {**DECISIONS[0], "category": "unheard of"}})
    with pytest.raises(ValueError, match="category is never 'unheard of'"):
        engine.decide("triage", EVENTS[0], deadline_s=60.0)


def test_an_answer_is_spelled_as_the_engine_writes_it(bundle: VerifiedBundle) -> None:
    engine = Engine(bundle, 1, PLAIN)
    event: Event = {"machine": "press-4", "text": "oil leak"}
    answer = engine.decide("triage", event, deadline_s=60.0)
    assert len(spelled(engine.prepared("triage").task.plan, answer.decision)) == answer.tokens_out


def told(one: RowPass) -> list[int]:
    """Tokens that are raised after each place of a pass, -1 for none; the row's text is 10 to 19 behind a prefix."""
    dictation = Dictation(HeadRows(40))
    dictation.start, dictation.texts = 3, [list(range(10, 20))]
    scores = np.zeros((len(one.score_at), 40), np.float32)
    dictation.raise_scores(one, scores)
    assert set(scores.ravel().tolist()) <= {0.0, float(CERTAIN)}
    return [int(row.argmax()) if row.any() else -1 for row in scores]


def test_what_comes_next_is_raised_where_the_pass_agrees_with_the_text() -> None:
    assert told(RowPass(0, 3, [10, 11, 12], [0, 2])) == [11, 13]
    assert told(RowPass(0, 5, [12, 13], [1])) == [14]
    assert told(RowPass(0, 5, [12, 30, 14], [0, 1, 2])) == [13, -1, -1]
    assert told(RowPass(0, 12, [19], [0])) == [-1], "behind the last token nothing is told"


def test_of_several_ways_the_one_that_agrees_is_told_on() -> None:
    # 10 11, then either 30 31 or 12 13, then 14 behind 13 and 32 beside it.
    tree = RowPass(0, 3, [10, 11, 30, 31, 12, 13, 14, 32], [1, 3, 5, 6, 7], follows=[-1, 0, -1, 2, 3, 3])
    assert told(tree) == [12, -1, 14, 15, -1]
