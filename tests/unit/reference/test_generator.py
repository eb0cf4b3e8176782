"""Faults of a generator: not repeatable, leaking between splits, labels that the schema refuses."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from edge_agent.contract.event import check_event
from edge_agent.contract.task import load_task
from export.reference import phrasing
from export.reference.evaluate import TASK_FILE
from export.reference.generator import SAFETY_CODES, LabelledEvent, generate
from export.reference.noise import JUNK, ORDERS
from export.reference.rules import ACTIONS, CATEGORIES, COMPONENTS, SEVERITIES, deviation_percent
from export.reference.vocabulary import MACHINE_NAMES, MACHINE_TYPES, Split
from export.reference.wording import MAX_TEXT_CHARS

TASK = load_task(TASK_FILE)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows() -> dict[Split, list[LabelledEvent]]:
    return {split: list(islice(generate(split, 3), 2000)) for split in SPLITS}


def test_same_seed_gives_the_same_events() -> None:
    first, second = (list(islice(generate("train", 5), 200)) for _ in range(2))
    assert [(e.event, e.decision) for e in first] == [(e.event, e.decision) for e in second]


def test_another_seed_or_split_gives_other_events() -> None:
    base = [e.event for e in islice(generate("train", 5), 50)]
    assert base != [e.event for e in islice(generate("train", 6), 50)]
    assert base != [e.event for e in islice(generate("test", 5), 50)]


def test_every_label_is_an_answer_of_the_task(rows: dict[Split, list[LabelledEvent]]) -> None:
    for labelled in (row for split in SPLITS for row in rows[split]):
        check_event(dict(labelled.event))
        assert TASK.check_decision(dict(labelled.decision)) == []


def test_guards_agree_with_the_gold_labels(rows: dict[Split, list[LabelledEvent]]) -> None:
    for labelled in (row for split in SPLITS for row in rows[split]):
        assert TASK.apply_guards(labelled.event, dict(labelled.decision)) == (labelled.decision, [])


def test_task_lists_the_values_that_the_rules_give() -> None:
    values = {field.name: getattr(field, "values", None) for field in TASK.output_fields}
    assert values == {
        "category": CATEGORIES,
        "severity": SEVERITIES,
        "action": ACTIONS,
        "escalate": None,
        "component": COMPONENTS,
    }
    assert set(SAFETY_CODES.values()) == set(TASK.guards[0].when[0].one_of or ())


def test_every_value_occurs_in_every_split(rows: dict[Split, list[LabelledEvent]]) -> None:
    for split in SPLITS:
        for field in TASK.output_fields:
            seen = {row.decision[field.name] for row in rows[split]}
            assert seen == set(getattr(field, "values", (False, True)))


def test_deviation_line_is_what_the_label_was_made_from(rows: dict[Split, list[LabelledEvent]]) -> None:
    for labelled in rows["test"]:
        event = labelled.event
        line = re.search(r"^over: ([+-]\d+) %$", TASK.render(event), re.MULTILINE)
        assert (int(line[1]) if line else None) == labelled.situation.deviation_percent
        if line:
            assert deviation_percent(float(event["value"] or 0), float(event["limit"] or 0)) == int(line[1])


def test_text_is_bounded(rows: dict[Split, list[LabelledEvent]]) -> None:
    assert max(len(str(row.event.get("text", ""))) for split in SPLITS for row in rows[split]) <= MAX_TEXT_CHARS


def _lists() -> list[tuple[str, dict[Split, tuple[str, ...]]]]:
    lists = [("machine type", MACHINE_TYPES), ("machine name", MACHINE_NAMES), ("junk", JUNK)]
    for name in ("NP_TEMPLATES", "VP_TEMPLATES", "BARE_TEMPLATES", "VAGUE", "NOMINAL"):
        lists += [(f"{name}.{language}", splits) for language, splits in getattr(phrasing, name).items()]
    lists += [(f"orders.{language}", splits) for language, splits in ORDERS.items()]
    lists += [(f"{q}.{language}", splits) for q, by in phrasing.QUALIFIERS.items() for language, splits in by.items()]
    return lists


@pytest.mark.parametrize(("name", "splits"), _lists(), ids=lambda value: value if isinstance(value, str) else None)
def test_no_template_is_shared_between_splits(name: str, splits: dict[Split, tuple[str, ...]]) -> None:
    folded = {split: {text.casefold() for text in texts} for split, texts in splits.items()}
    assert not folded["test"] & (folded["train"] | folded["validation"])
    assert not folded["validation"] & folded["train"]


def test_no_held_out_machine_in_training_events() -> None:
    # Types as whole words: "press" may not hide in "compressor", nor "laser" in "laser scanner" (a component).
    held_out = re.compile(r"(?<![a-zäöü])(" + "|".join(MACHINE_TYPES["test"]) + r")(?![a-zäöü])", re.IGNORECASE)
    for labelled in islice(generate("train", 9), 3000):
        assert not held_out.search(str(labelled.event.get("machine", ""))), labelled.event


def test_events_without_a_telling_text_have_no_cue_that_only_a_text_could_show(
    rows: dict[Split, list[LabelledEvent]],
) -> None:
    silent = {"", "alarm", "see code", "fault code", "meldung", "siehe code"}
    found = [row for row in rows["test"] if str(row.event.get("text", "")).casefold() in silent]
    assert found
    for row in found:
        assert row.situation.stated is None
        assert not row.situation.injected


@pytest.mark.parametrize("split", SPLITS)
def test_planted_orders_always_escalate(split: Split) -> None:
    planted = [row for row in islice(generate(split, 4), 1000) if row.situation.injected]
    assert planted
    assert all(row.decision["escalate"] for row in planted)
