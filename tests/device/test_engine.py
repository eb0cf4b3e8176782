"""The engine on the real model: equal to the plain decoder, blind to history, deaf to injections."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.engine import Engine
from export.proof.greedy import GreedyDecoder
from tests.fakes.answers import timeless
from tests.fakes.bundles import BundleVariant
from tests.fakes.hostile_texts import HOSTILE_TEXTS, SCRIPTS

EVENT: Event = {"machine": "press-4", "code": "E217", "text": "hydraulic pressure below setpoint for 12 s"}
WORDS = (  # noqa: SIM905 - fifty quoted words would be harder to read
    "hydraulic pressure below setpoint bearing vibration high temperature oven zone motor overload trip robot gripper "
    "lost part door open while running conveyor belt jam Druck zu niedrig Lager heiß Störung Not-Halt betätigt sensor "
    "no signal fieldbus timeout 12 s 80 % axis 3 coolant level low filter clogged"
).split()
TIE = 0.05  # logits closer than this may part between a pass of many tokens and many passes of one


def some_events(count: int, seed: int = 7) -> list[Event]:
    rng = random.Random(seed)
    events: list[Event] = []
    for number in range(count):
        event: Event = {"machine": f"{rng.choice(WORDS[:8])}-{number}"}
        if rng.random() < 0.7:
            event["code"] = f"E{rng.randrange(1000)}"
        if rng.random() < 0.5:
            event |= {"value": rng.randrange(200), "limit": rng.randrange(1, 200), "unit": "bar"}
        event["text"] = " ".join(rng.choices(WORDS, k=rng.randrange(1, 30)))
        events.append(event)
    return events


def decide(engine: Engine, event: Event, task: str = "triage") -> Answer:
    return engine.decide(task, event, deadline_s=60.0)


TaskFile = dict[str, Any]
Build = Callable[[Callable[[TaskFile], None]], Engine]


@pytest.fixture
def engine_with(variant: Callable[[], BundleVariant]) -> Build:
    """An engine whose task ``triage`` was edited."""

    def build(edit: Callable[[TaskFile], None]) -> Engine:
        bundle = variant()
        task = yaml.safe_load((bundle.path / "tasks/triage/task.yaml").read_text())
        edit(task)
        bundle.put("tasks/triage/task.yaml", json.dumps(task))
        bundle.drop("tasks/triage/golden.jsonl")
        # Flat enough that no threshold of 1.0 is ever met, however sure the model is.
        known = {"category": 20.0} if "category" in task["output"]["properties"] else {}
        bundle.put("tasks/triage/calibration.json", json.dumps({"format": 1, "temperature": known}))
        bundle.seal()
        return Engine(bundle.open(), 1)

    return build


def test_answers_equal_plain_greedy_decoding_one_token_at_a_time(engine: Engine, reference_bundle: Path) -> None:
    manifest, _ = read_manifest(reference_bundle)
    model = manifest.model
    oracle = GreedyDecoder(reference_bundle / model.decoder, reference_bundle / model.tokenizer, model)
    task = engine.tasks["triage"]
    for event in some_events(25):
        fast, plain = decide(engine, event), oracle.decide(task, event)
        expected, _ = task.apply_guards(event, plain.decision)
        if fast.decision != expected:
            part = next(choice for choice in plain.choices if fast.decision[choice.field] != expected[choice.field])
            ordered = np.sort(part.logits)
            assert ordered[-1] - ordered[-2] < TIE, (event, part.field)
            continue
        assert fast.tokens_out == len(plain.tokens)
        calibrated = engine.prepared("triage").task.calibration.temperatures
        assert fast.confidence == pytest.approx(plain.confidence(calibrated), abs=0.02)


def test_answer_does_not_depend_on_the_events_before_it(engine: Engine) -> None:
    events = some_events(20)
    alone = [timeless(decide(engine, event)) for event in events]
    order = list(range(len(events)))
    random.Random(3).shuffle(order)
    for index in order:
        assert timeless(decide(engine, events[index])) == alone[index]


def test_answer_does_not_depend_on_an_event_that_failed_before_it(engine: Engine) -> None:
    before = timeless(decide(engine, EVENT))
    with pytest.raises(PermanentError) as caught:
        engine.decide("triage", {"text": "another event " * 20}, deadline_s=0.0)
    assert caught.value.code == "worker.deadline"
    with pytest.raises(RefusedError):
        decide(engine, {"unknown_field": 1})
    assert timeless(decide(engine, EVENT)) == before


def test_a_second_engine_gives_the_same_answers(engine: Engine) -> None:
    other = Engine(engine.bundle, 1)
    assert [timeless(decide(other, e)) for e in some_events(5)] == [timeless(decide(engine, e)) for e in some_events(5)]


def test_passes_are_decisions_not_tokens(engine: Engine) -> None:
    answer = decide(engine, EVENT)
    assert answer.passes <= len(answer.decision)
    assert answer.tokens_out > 3 * answer.passes


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_text_yields_a_valid_answer_and_no_control_token(engine: Engine, text: str) -> None:
    task, prepared = engine.tasks["triage"], engine.prepared("triage")
    event: Event = {"machine": "press-4", "code": text, "text": text}
    ids = engine.encode_event("triage", event)
    assert len(ids) <= task.limits.max_prompt_tokens
    assert engine.control_ids.isdisjoint(ids)
    # One line per field and the cue: text cannot open a line of its own.
    assert task.render(event).count("\n") <= 3
    answer = decide(engine, event)
    assert task.check_decision(answer.decision) == []
    assert prepared.task.spec.prompt.prefix.strip() not in json.dumps(answer.decision)
    assert answer.passes <= len(answer.decision)


def test_forty_scripts_yield_valid_answers(engine: Engine) -> None:
    assert len(SCRIPTS) >= 40
    for name, text in SCRIPTS.items():
        answer = decide(engine, {"machine": name, "text": text * 3})
        assert engine.tasks["triage"].check_decision(answer.decision) == [], name


def test_special_token_spelled_out_in_an_event_is_read_as_text(engine: Engine, reference_bundle: Path) -> None:
    added = json.loads((reference_bundle / "tokenizer.json").read_text())["added_tokens"]
    assert added
    for token in added:
        ids = engine.encode_event("triage", {"text": f"before {token['content']} after"})
        assert token["id"] not in ids


def test_overlong_event_is_cut_visibly_and_keeps_the_answer_cue(engine_with: Build) -> None:
    def edit(task: TaskFile) -> None:
        task["limits"] = {"max_prompt_tokens": 40}

    engine = engine_with(edit)
    long_event: Event = {"machine": "press-4", "text": "valve " * 25, "unit": "bar"}
    ids = engine.encode_event("triage", long_event)
    assert 30 < len(ids) <= 40
    cue = engine.encode_event("triage", {"unit": "bar"})[-2:]
    assert ids[-2:] == cue
    assert decide(engine, long_event).truncated
    assert not decide(engine, {"machine": "press-4", "text": "valve"}).truncated


def test_overlong_event_is_refused_where_the_task_says_so(engine_with: Build) -> None:
    def edit(task: TaskFile) -> None:
        task["limits"] = {"max_prompt_tokens": 20}
        task["prompt"]["on_overlong"] = "refuse"

    with pytest.raises(RefusedError) as caught:
        decide(engine_with(edit), {"text": "valve " * 25})
    assert caught.value.code == "event.too_long"


def test_text_cut_by_the_template_is_said_to_be_truncated(engine: Engine) -> None:
    assert decide(engine, {"text": "pump " * 100}).truncated
    assert not decide(engine, {"text": "pump"}).truncated


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({}, "event.empty"),
        ({"nothing": "known"}, "event.no_known_field"),
        ({"text": ["nested"]}, "event.bad_field"),
        ({"value": float("nan")}, "event.bad_field"),
        ({"value": 10**400, "text": "x"}, "event.bad_field"),
        ({"text": "x" * 20_000}, "event.too_large"),
        ([1, 2], "event.not_object"),
    ],
    ids=["empty", "unknown", "nested", "nan", "huge-integer", "too-large", "list"],
)
def test_bad_event_is_refused_with_its_code(engine: Engine, event: Any, code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        decide(engine, event)
    assert caught.value.code == code


def test_numbers_at_the_edge_of_a_double_are_decided(engine: Engine) -> None:
    for value, limit in ((1e308, -1e308), (-1.7e308, 1e-300), (2**511, 1), (0.0, 5e-324)):
        answer = decide(engine, {"machine": "m", "value": value, "limit": limit})
        assert engine.tasks["triage"].check_decision(answer.decision) == []


def test_unknown_task_is_refused_with_the_known_ones(engine: Engine) -> None:
    with pytest.raises(RefusedError, match="triage") as caught:
        decide(engine, EVENT, task="nonsense")
    assert caught.value.code == "task.unknown"


def test_low_confidence_abstains_and_keeps_the_best_guess(engine_with: Build) -> None:
    engine = engine_with(lambda task: task.update(thresholds={"category": 1.0, "severity": 0.0}, guards=[]))
    answer = decide(engine, EVENT)
    assert answer.confidence["category"] < 1.0
    assert answer.unsure_fields == ("category",)
    assert answer.route == "abstained"
    assert engine.tasks["triage"].check_decision(answer.decision) == []


def test_guard_overrides_a_confident_answer_and_is_named(engine_with: Build) -> None:
    def edit(task: TaskFile) -> None:
        task["thresholds"] = {}
        task["guards"] = [
            {
                "name": "up",
                "when": [{"event": "code", "equals": "E217"}],
                "then": {"severity": {"at_least": "critical"}},
            },
            {"name": "flip", "when": [{"event": "code", "equals": "E217"}], "then": {"escalate": {"equals": True}}},
            {"name": "off", "when": [{"event": "code", "equals": "E217"}], "then": {"escalate": {"equals": False}}},
            {"name": "other", "when": [{"event": "code", "equals": "E218"}], "then": {"severity": {"equals": "info"}}},
        ]

    engine = engine_with(edit)
    answer = decide(engine, EVENT)
    assert answer.decision["severity"] == "critical"
    assert answer.decision["escalate"] is False
    assert answer.route == "rule"
    assert "off" in answer.guards or "flip" in answer.guards
    assert "other" not in answer.guards


def test_an_unsure_answer_that_a_guard_changed_still_abstains(engine_with: Build) -> None:
    def edit(task: TaskFile) -> None:
        task["thresholds"] = {"category": 1.0}
        task["guards"] = [
            {"name": "on", "when": [{"event": "code", "equals": "E217"}], "then": {"escalate": {"equals": True}}},
            {"name": "off", "when": [{"event": "code", "equals": "E217"}], "then": {"escalate": {"equals": False}}},
        ]

    answer = decide(engine_with(edit), EVENT)
    assert (answer.route, answer.guards[-1]) == ("abstained", "off")


def test_calibration_changes_confidence_but_not_the_answer(
    engine: Engine, variant: Callable[[], BundleVariant]
) -> None:
    bundle = variant()
    bundle.put("tasks/triage/calibration.json", json.dumps({"format": 1, "temperature": {"category": 1e6}}))
    bundle.seal()
    flat, plain = decide(Engine(bundle.open(), 1), EVENT), decide(engine, EVENT)
    assert flat.decision == plain.decision
    assert flat.confidence["category"] == pytest.approx(0.1, abs=0.01)  # ten categories, all alike


def test_a_line_changes_the_published_confidence_and_no_decision(
    engine: Engine, variant: Callable[[], BundleVariant]
) -> None:
    bundle = variant()
    line = {"raw": [0.0, 1.0], "right": [0.0, 0.5]}
    before = json.loads((bundle.path / "tasks/triage/calibration.json").read_text())
    bundle.put("tasks/triage/calibration.json", json.dumps({**before, "format": 2, "knots": {"category": line}}))
    bundle.seal()
    read, plain = decide(Engine(bundle.open(), 1), EVENT), decide(engine, EVENT)
    assert read.decision == plain.decision
    assert read.confidence == pytest.approx({**plain.confidence, "category": plain.confidence["category"] / 2})
    # What is published is what the floor is held against: 0.6 is out of reach now.
    assert (read.route, read.unsure_fields) == ("abstained", ("category",))


def test_a_chosen_floor_decides_the_route_and_a_missing_one_the_load(variant: Callable[[], BundleVariant]) -> None:
    bundle = variant()
    task = yaml.safe_load((bundle.path / "tasks/triage/task.yaml").read_text())
    task["thresholds"] = {"category": {"max_wrong": 0.01, "abstain": 0.999}, "severity": 0.0}
    bundle.put("tasks/triage/task.yaml", json.dumps(task))
    bundle.drop("tasks/triage/golden.jsonl")
    chosen = {"max_wrong": 0.01, "certainty": 0.95, "events": 500, "passed": 400, "wrong": 0}
    flat = {"category": 3.0}
    answers = []
    for floor in (0.5, 1.0, None):
        floors = {"category": {**chosen, "floor": floor}}
        bundle.put("tasks/triage/calibration.json", json.dumps({"format": 1, "temperature": flat, "floors": floors}))
        bundle.seal()
        answers.append(decide(Engine(bundle.open(), 1), {"machine": "press-4", "text": "hydraulic pump leaks oil"}))
        assert Answer.from_dict(json.loads(json.dumps(answers[-1].as_dict()))) == answers[-1]
    assert 0.5 < answers[0].confidence["category"] < 0.999
    assert [answer.route for answer in answers] == ["device", "abstained", "abstained"]
    assert [answer.hopeless_fields for answer in answers] == [(), ("category",), ("category",)]
    bundle.drop("tasks/triage/calibration.json")
    bundle.seal()
    with pytest.raises(PermanentError) as caught:
        Engine(bundle.open(), 1)
    assert caught.value.code == "task.calibration_invalid"


@pytest.mark.parametrize(
    "text",
    ["{", '{"format": 2}', '{"format": 1, "temperature": {"nonsense": 1}}',
     '{"format": 1, "temperature": {"category": 0}}', '{"format": 1, "temperature": {"category": "Infinity"}}'],
)  # fmt: skip
def test_bad_calibration_is_refused_at_load(variant: Callable[[], BundleVariant], text: str) -> None:
    bundle = variant()
    bundle.put("tasks/triage/calibration.json", text)
    bundle.seal()
    with pytest.raises(PermanentError) as caught:
        Engine(bundle.open(), 1)
    assert caught.value.code == "task.calibration_invalid"


OPEN_OUTPUT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "only": {"enum": ["one"]},
        "stop": {"enum": ["stop", "stop_all", "stop_all_now", 'st"o\\p', "größer"]},
        "note": {"type": "string", "maxLength": 12},
        "wide": {"type": "integer", "minimum": -70000, "maximum": 1000000},
        "level": {"type": "integer", "minimum": -3, "maximum": 120},
        "urgent": {"type": "boolean"},
        "last": {"type": "string", "maxLength": 3},
    },
}


def test_every_kind_of_field_is_decided_within_its_bounds(engine_with: Build) -> None:
    def edit(task: TaskFile) -> None:
        task.update(output=OPEN_OUTPUT, thresholds={}, guards=[])

    engine = engine_with(edit)
    task = engine.tasks["triage"]
    for event in some_events(15):
        answer = decide(engine, event)
        assert task.check_decision(answer.decision) == []
        assert list(answer.decision) == list(OPEN_OUTPUT["properties"])
        assert answer.confidence["only"] == 1.0
        assert all(0 < p <= 1 for p in answer.confidence.values())
        json.dumps(answer.decision, ensure_ascii=False).encode("utf-8")


def test_open_fields_equal_plain_greedy_decoding(engine_with: Build) -> None:
    def edit(task: TaskFile) -> None:
        task.update(output=OPEN_OUTPUT, thresholds={}, guards=[])

    engine = engine_with(edit)
    model = engine.bundle.manifest.model
    oracle = GreedyDecoder(engine.bundle.path / model.decoder, engine.bundle.path / model.tokenizer, model)
    for event in some_events(6):
        fast, plain = decide(engine, event), oracle.decide(engine.tasks["triage"], event)
        if fast.decision != plain.decision:
            margins = [np.diff(np.sort(c.logits)[-2:])[0] for c in plain.choices]
            assert min(margins) < TIE, event


def test_task_that_cannot_fit_the_models_context_is_refused_at_load(engine_with: Build) -> None:
    with pytest.raises(PermanentError) as caught:
        engine_with(lambda task: task.update(limits={"max_prompt_tokens": 8000}))
    assert caught.value.code == "task.context_exceeded"


def test_two_tasks_on_one_model_do_not_disturb_each_other(variant: Callable[[], BundleVariant], engine: Engine) -> None:
    bundle = variant()
    task = yaml.safe_load((bundle.path / "tasks/triage/task.yaml").read_text())
    task["name"] = "other"
    task["prompt"]["prefix"] = "Something else entirely, and longer than the first.\n"
    bundle.put("tasks/other/task.yaml", json.dumps(task))
    bundle.seal()
    both = Engine(bundle.open(), 1)
    expected = timeless(decide(engine, EVENT))
    decide(both, EVENT, task="other")
    assert timeless(decide(both, EVENT)) == expected
    assert set(both.tasks) == {"triage", "other"}
