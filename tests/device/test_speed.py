"""Every lever of `Speed` at once changes no decision; and each of them does what it is there for."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.decoder import Decoded
from edge_agent.runtime.drafts import PassCost
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.kv_cache import KvCache, RowPass
from edge_agent.runtime.prepared import Question
from edge_agent.runtime.speed import PLAIN, Speed
from export.reference.generator import generate
from tests.bench.equality import FASTEST, compare, repeated
from tests.fakes.bundles import BundleVariant

EVENT: Event = {"machine": "press-4", "code": "E217", "text": "hydraulic pressure low for 12 s"}
CONFIDENCE_TOLERANCE = 2e-3


def some_events(count: int, seed: int = 5) -> list[Event]:
    return [dict(one.event) for one in itertools.islice(generate("test", seed), count)]


def flood(count: int) -> list[Event]:
    """One machine's alarms: only the counter and a few words change."""
    return [{**EVENT, "state": "running", "count": n, "text": f"oil leak {n % 3}"} for n in range(count)]


@pytest.fixture
def opened(reference_bundle: Path, reference_digest: str) -> Callable[[Speed], Engine]:
    return lambda speed: Engine(open_installed_bundle(reference_bundle, reference_digest), 1, speed)


def decided(engine: Engine, events: list[Event]) -> list[Answer]:
    found = engine.decide_many("triage", events, deadline_s=60.0)
    assert not any(isinstance(one, EdgeError) for one in found)
    return [one for one in found if isinstance(one, Answer)]


def assert_alike(found: list[Answer], expected: list[Answer], *, to_the_bit: bool = False) -> None:
    assert [one.decision for one in found] == [one.decision for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=0.0 if to_the_bit else CONFIDENCE_TOLERANCE)


def test_every_lever_at_once_equals_plain_decoding_one_token_at_a_time(reference_bundle: Path) -> None:
    events = list(itertools.islice(repeated(iter(some_events(60) + flood(12))), 80))
    assert [str(one) for one in compare(reference_bundle, events)] == []


@pytest.mark.parametrize(
    "speed",
    [
        replace(PLAIN, event_cache_bytes=1 << 20),
        replace(PLAIN, drafts=True),
        replace(PLAIN, alternatives=True),
        replace(PLAIN, drafts=True, alternatives=True),
        replace(PLAIN, together=4),
        replace(PLAIN, large_pages=True),
        FASTEST,
    ],
    ids=["events", "drafts", "alternatives", "drafts-and-alternatives", "together", "large-pages", "all"],
)
def test_a_lever_changes_no_decision(opened: Callable[[Speed], Engine], speed: Speed) -> None:
    events = some_events(30) + flood(20)
    expected = [opened(PLAIN).decide("triage", event, deadline_s=60.0) for event in events]
    # A guess beside another one may be scored with the last digits of other sums, far from any tie.
    assert_alike(decided(opened(speed), events), expected, to_the_bit=not speed.alternatives)


@pytest.mark.parametrize("sizes", [[1], [2], [3], [7], [16], [1, 5], [40, 1]], ids=str)
def test_scores_are_the_same_bits_however_tokens_are_split_into_passes(
    opened: Callable[[Speed], Engine], sizes: list[int]
) -> None:
    engine = opened(Speed())
    task = engine.prepared("triage")
    cache, start = task.cache, task.prefix_tokens
    assert isinstance(cache, KvCache)
    for event in some_events(6):
        ids = engine.encode_event("triage", event)
        (expected,) = [scores.copy() for scores in cache.run([RowPass(0, start, ids, [len(ids) - 1])])]
        expected_kv = cache.read(0, start, start + len(ids))
        at, pieces, found = 0, itertools.cycle(sizes), expected
        while at < len(ids):
            piece = ids[at : at + next(pieces)]
            (found,) = cache.run([RowPass(0, start + at, piece, [len(piece) - 1])])
            at += len(piece)
        assert found is not expected
        assert np.array_equal(found, expected)
        assert np.array_equal(cache.read(0, start, start + len(ids)), expected_kv)


def test_an_answer_does_not_depend_on_its_company(opened: Callable[[Speed], Engine]) -> None:
    events = some_events(24)
    expected = {json.dumps(e): a for e, a in zip(events, decided(opened(Speed()), events), strict=True)}
    for seed in range(3):
        shuffled = random.Random(seed).sample(events, len(events))
        assert_alike(decided(opened(Speed()), shuffled), [expected[json.dumps(event)] for event in shuffled])


def test_levers_save_passes_and_tokens(opened: Callable[[Speed], Engine]) -> None:
    events = flood(30)
    plain, fast = opened(PLAIN), opened(Speed())
    passes = [sum(one.passes for one in decided(engine, events)) for engine in (plain, fast)]
    assert passes[1] < 0.7 * passes[0]
    assert fast.prepared("triage").events.hit_tokens > 10 * len(events)


class SteadyCost(PassCost):
    """A machine whose passes always cost the same: beside a busy one no guess may seem to pay."""

    def learn(self, tokens: int, seconds: float) -> None:
        pass


def test_two_ways_in_one_pass_save_one(opened: Callable[[Speed], Engine]) -> None:
    events = some_events(20)
    passes = []
    for tried in (False, True):
        engine = opened(replace(PLAIN, alternatives=tried))
        task = replace(engine.prepared("triage"), cost=SteadyCost())
        questions = [Question(engine.encode_event("triage", event), math.inf) for event in events]
        found = [one for question in questions for one in task.decode([question]) if isinstance(one, Decoded)]
        assert len(found) == len(events)
        passes.append(sum(one.passes for one in found))
    plain, both = (decided(opened(replace(PLAIN, alternatives=tried)), events) for tried in (False, True))
    assert_alike(both, plain)
    assert passes[1] <= passes[0] - 0.8 * len(events)


def test_one_event_s_fault_leaves_its_company_answered(opened: Callable[[Speed], Engine]) -> None:
    events: list[Event] = [EVENT, {"unknown": 1}, {**EVENT, "text": "x" * 60_000}, {**EVENT, "text": "fan"}]
    found = opened(FASTEST).decide_many("triage", events, deadline_s=60.0)
    assert [one.code if isinstance(one, EdgeError) else "answered" for one in found] == [
        "answered", "event.no_known_field", "event.too_large", "answered",
    ]  # fmt: skip


def test_a_deadline_that_has_passed_fails_what_is_not_known_already(opened: Callable[[Speed], Engine]) -> None:
    engine = opened(FASTEST)
    decided(engine, [EVENT])
    found = engine.decide_many("triage", [EVENT, {**EVENT, "text": "fan"}], deadline_s=0.0)
    assert isinstance(found[0], Answer), "from memory, at no cost"
    assert isinstance(found[1], EdgeError)
    assert found[1].code == "worker.deadline"
    assert_alike(decided(engine, [{**EVENT, "text": "fan"}]), decided(opened(PLAIN), [{**EVENT, "text": "fan"}]))


def test_a_repeated_event_is_answered_from_memory_and_says_so(opened: Callable[[Speed], Engine]) -> None:
    engine = opened(FASTEST)
    first, again = decided(engine, [EVENT]), decided(engine, [{**EVENT, "time": 99, "id": "other"}])
    assert [one.route for one in first + again] == ["device", "cache"]
    assert again[0].passes == 0
    assert (again[0].decision, again[0].confidence) == (first[0].decision, first[0].confidence)


def test_an_engine_without_the_lever_answers_a_repeated_event_anew(opened: Callable[[Speed], Engine]) -> None:
    engine = opened(Speed())
    assert [one.route for one in decided(engine, [EVENT]) + decided(engine, [EVENT])] == ["device", "device"]


def edited(variant: Callable[[], BundleVariant], edit: Callable[[dict[str, Any]], None]) -> Engine:
    bundle = variant()
    task = yaml.safe_load((bundle.path / "tasks/triage/task.yaml").read_text())
    edit(task)
    bundle.put("tasks/triage/task.yaml", json.dumps(task))
    bundle.seal()
    return Engine(bundle.open(), 1, FASTEST)


def test_a_task_can_refuse_answers_from_memory(variant: Callable[[], BundleVariant]) -> None:
    engine = edited(variant, lambda task: task.update(cache=False))
    assert [one.route for one in decided(engine, [EVENT]) + decided(engine, [EVENT])] == ["device", "device"]


def test_guards_run_for_an_answer_from_memory(variant: Callable[[], BundleVariant]) -> None:
    # The template does not show `zone`, so both events are the same to the model; the guard tells them apart.
    guard = {
        "name": "zone_one",
        "when": [{"event": "zone", "equals": 1}],
        "then": {"severity": {"equals": "critical"}},
    }
    engine = edited(variant, lambda task: task.update(guards=[guard], thresholds={}))
    found = [decided(engine, [{**EVENT, "zone": zone}])[0] for zone in (0, 1, 0)]
    assert [one.guards for one in found] == [(), ("zone_one",), ()]
    assert found[1].decision["severity"] == "critical"
    assert found[2].decision == found[0].decision
    assert [one.route for one in found] == ["device", "rule", "cache"]


def test_an_event_that_was_cut_to_its_tokens_answers_for_no_other(opened: Callable[[Speed], Engine]) -> None:
    engine = opened(FASTEST)
    # Rare scripts take several tokens a character: the template's characters fit, the tokens do not.
    long = {**EVENT, "text": "\u0d05\u0d06\u0d07" * 60}
    first = decided(engine, [long])[0]
    assert first.truncated
    assert decided(engine, [long])[0].route == first.route == "device" or first.route == "abstained"
    assert decided(engine, [long])[0].passes > 0


@pytest.mark.parametrize("damage", [None, "cut", "flip"])
def test_the_prefix_is_read_back_after_a_restart_and_computed_anew_where_its_file_is_damaged(
    opened: Callable[[Speed], Engine], tmp_path: Path, damage: str | None
) -> None:
    speed = Speed(prefix_dir=tmp_path / "prefixes")
    expected = decided(opened(speed), some_events(5))
    (file,) = (tmp_path / "prefixes").iterdir()
    raw = bytearray(file.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "flip":
        raw[-9] ^= 0x40
    file.write_bytes(raw)
    assert_alike(decided(opened(speed), some_events(5)), expected)


def test_the_state_on_disk_is_what_a_restart_uses(opened: Callable[[Speed], Engine], tmp_path: Path) -> None:
    speed = Speed(prefix_dir=tmp_path / "prefixes")
    cache = opened(speed).prepared("triage").cache
    restarted = opened(speed).prepared("triage").cache
    assert isinstance(cache, KvCache)
    assert isinstance(restarted, KvCache)
    assert cache.length == restarted.length > 0
    assert np.array_equal(cache.read(0, 0, cache.length), restarted.read(0, 0, cache.length))
    assert restarted.passes == 0, "no pass was needed to fill it"


def test_rows_of_a_batch_hold_the_same_prefix(opened: Callable[[Speed], Engine]) -> None:
    engine = opened(Speed(together=3))
    decided(engine, some_events(3))
    cache = engine.prepared("triage").cache
    assert isinstance(cache, KvCache)
    states = [cache.read(row, 0, cache.length) for row in range(3)]
    assert all(np.array_equal(states[0], other) for other in states[1:])


LOADED = """
import gc, sys
from pathlib import Path
from edge_agent.runtime.speed import PLAIN
from edge_agent.runtime.worker import load_engine
engine = load_engine(Path(sys.argv[1]), sys.argv[2], 1, PLAIN)
print(len(gc.get_objects()), gc.get_freeze_count())
"""


def test_what_is_loaded_is_not_looked_through_for_garbage_between_events(
    reference_bundle: Path, reference_digest: str
) -> None:
    command = [sys.executable, "-c", LOADED, str(reference_bundle), reference_digest]
    watched, loaded = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert loaded > 10_000
    assert watched < 1_000
