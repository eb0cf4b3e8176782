"""Factory events with gold labels: draw a situation, write it down as a person or a PLC would, apply the rules.

    for labelled in generate("train", seed=1):
        labelled.event, labelled.decision

Everything follows from (split, seed). Sentence templates, machine names and code formats of one split are never
used by another; the vocabulary of components and symptoms is shared, because a model trained from nothing cannot
know a word that it has never read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from edge_agent.contract.event import Event
from export.reference import modes_drives, modes_media, modes_safety
from export.reference.noise import ORDERS, planted_order
from export.reference.phrasing import Language
from export.reference.rules import (
    ACTIONS,
    CATEGORIES,
    REPEATS_THAT_RAISE,
    SEVERITIES,
    Decision,
    Mode,
    Qualifier,
    Situation,
    decide,
    deviation_percent,
)
from export.reference.vocabulary import MACHINE_NAMES, STATES, Split
from export.reference.wording import Clues, machine_type, write_text

MODES_BY_CATEGORY: dict[str, tuple[Mode, ...]] = {
    "mechanical": modes_drives.MECHANICAL,
    "electrical": modes_drives.ELECTRICAL,
    "thermal": modes_drives.THERMAL,
    "hydraulic": modes_media.HYDRAULIC,
    "pneumatic": modes_media.PNEUMATIC,
    "control": modes_media.CONTROL,
    "network": modes_media.NETWORK,
    "safety": modes_safety.SAFETY,
    "material": modes_safety.MATERIAL,
}
ALL_MODES = (*(mode for modes in MODES_BY_CATEGORY.values() for mode in modes), *modes_safety.COMPLAINTS)
SAFETY_CODES = {"estop_pressed": "F-STOP", "bypassed": "GUARD-BYP", "fire": "FIRE-DET", "gas": "GAS-HI"}
"""Exact codes that the task's guard rule knows. They appear only where the gold severity is at least high."""

_CODE_FORMATS: dict[Split, tuple[str, ...]] = {
    "train": ("{k}", "{k}-{d2}", "{k}{d}", "{k}_{d2}", "{C}{d2}-{k}", "{k}:{d}", "AL-{k}", "{k}.{C}"),
    "validation": ("{k}/{d}", "W-{k}"),
    "test": ("ALM {k}", "{d2}{k}", "{k}+{d}"),
}
_MEANINGLESS_CODES: dict[Split, tuple[str, ...]] = {
    "train": ("E{d4}", "{d4}", "A{d3}", "F{d4}", "W{d3}", "MSG{d2}", "{d3}-{d2}"),
    "validation": ("X{d4}", "{d2}.{d3}"),
    "test": ("N{d4}", "EV{d3}", "{d2}/{d2}"),
}


@dataclass(frozen=True)
class LabelledEvent:
    """An event, the right answer, and the situation it was written from."""

    event: Event
    decision: Decision
    situation: Situation


def generate(split: Split, seed: int) -> Iterator[LabelledEvent]:
    """Events of one split, without end.

    Args:
        split: whose templates, machine names and code formats to use.
        seed: events follow from (split, seed) alone.

    Returns:
        An endless iterator; take what is needed with ``itertools.islice``.
    """
    rng = random.Random(f"{split}-{seed}")
    number = 0
    while True:
        number += 1
        yield _labelled_event(rng, split, number)


def _labelled_event(rng: random.Random, split: Split, number: int) -> LabelledEvent:
    situation, clues = _draw_situation(rng)
    event: Event = {}
    if rng.random() < 0.35:
        event["id"] = f"{rng.choice('abcdef')}{rng.randrange(10**6):06d}-{number}"
    if rng.random() < 0.93:
        event["machine"] = fill(rng.choice(MACHINE_NAMES[split]), rng, {"t": machine_type(rng, split)})
    situation, measured = _draw_measurement(rng, situation)
    if not clues.code_only:
        situation = _draw_stated(rng, situation)
    situation, state, clues = _draw_state(rng, situation, clues)
    situation, count, clues = _draw_repeats(rng, situation, clues)
    if rng.random() < 0.07 and not clues.code_only:
        situation = replace(situation, injected=True)
        clues = replace(clues, order=_draw_order(rng, split))
    decision = decide(situation)
    code = _draw_code(rng, split, situation, str(decision["severity"]), clues)
    if code:
        event["code"] = code
    if state:
        event["state"] = state
    event.update(measured)
    if count is not None:
        event["count"] = count
    if not clues.code_only:
        event["text"] = write_text(rng, split, situation, clues, value=_value_text(rng, measured))
    elif rng.random() < 0.5:
        event["text"] = rng.choice(("alarm", "see code", "Alarm", "fault code", "Meldung", "siehe Code"))
    if rng.random() < 0.4:
        event["time"] = 1_700_000_000 + rng.randrange(60_000_000)
    return LabelledEvent(event, decision, situation)


def _draw_situation(rng: random.Random) -> tuple[Situation, Clues]:
    draw = rng.random()
    if draw < 0.05:
        return Situation(None, None, qualifier=_draw_qualifier(rng)), Clues()
    if draw < 0.11:
        mode = rng.choice([m for m in ALL_MODES if m.anonymous])
        return Situation(mode, None, qualifier=_draw_qualifier(rng)), Clues()
    if draw < 0.15:
        mode = rng.choice([m for m in ALL_MODES if m.codes])
        component = mode.components[0] if len(mode.components) == 1 else None
        return Situation(mode, component), Clues(code_only=True)
    if draw < 0.23:
        mode = rng.choice(modes_safety.COMPLAINTS)
    else:
        mode = rng.choice(MODES_BY_CATEGORY[rng.choice(CATEGORIES[:-1])])
    component = rng.choice(mode.components)
    if rng.random() < 0.04 and mode.category != "safety":
        return Situation(mode, component, qualifier="nominal"), Clues()
    return Situation(mode, component, qualifier=_draw_qualifier(rng)), Clues()


def _draw_qualifier(rng: random.Random) -> Qualifier:
    draw = rng.random()
    if draw < 0.07:
        return "test"
    if draw < 0.14:
        return "maintenance"
    return "cleared" if draw < 0.22 else "none"


def _draw_measurement(rng: random.Random, situation: Situation) -> tuple[Situation, Event]:
    mode = situation.mode
    if mode is None or not mode.quantity or rng.random() < 0.35 or situation.qualifier == "nominal":
        return situation, {}
    unit, lowest, highest = rng.choice(mode.quantity)
    limit = _round(rng.uniform(lowest, highest))
    # Five bands of equal weight: within limits, notice, warning, alarm, failure.
    low, high = rng.choice(((-40, 0), (0, 5), (5, 20), (20, 50), (50, 95 if mode.direction < 0 else 160)))
    value = _round(limit * (1 + mode.direction * rng.uniform(low, high) / 100))
    fields: Event = {"value": value}
    if rng.random() < 0.85:
        fields["unit"] = unit
    if rng.random() < 0.9:
        fields["limit"] = limit
        situation = replace(situation, deviation_percent=deviation_percent(value, limit))
    return situation, fields


def _round(number: float) -> float:
    if number >= 200:
        return float(round(number))
    return round(number, 1) if number >= 5 else round(number, 2)


def _draw_stated(rng: random.Random, situation: Situation) -> Situation:
    mode = situation.mode
    share = 0.5 if situation.deviation_percent is None else 0.25
    if situation.qualifier == "nominal" or rng.random() >= share:
        return situation
    lowest = 2 if mode is not None and mode.while_moving else (mode.implied or 0) if mode is not None else 0
    return replace(situation, stated=rng.randrange(lowest, 4))


def _draw_state(rng: random.Random, situation: Situation, clues: Clues) -> tuple[Situation, str, Clues]:
    """Decide what is said about the machine's state, in the state field, in words or not at all."""
    if situation.qualifier != "none":
        return _draw_qualified_state(rng, situation, clues)
    draw = rng.random()
    state = ""
    if draw < 0.42:
        state = rng.choice(STATES["running"])
    elif draw < 0.66:
        situation, state = replace(situation, halted=True), rng.choice(STATES["halted"])
    elif draw < 0.78 and not clues.code_only:
        situation, clues = replace(situation, halted=True), replace(clues, halt_in_text=True)
    return situation, state, clues


def _draw_qualified_state(rng: random.Random, situation: Situation, clues: Clues) -> tuple[Situation, str, Clues]:
    qualifier = situation.qualifier
    if qualifier in ("test", "maintenance") and rng.random() < 0.45:
        return situation, rng.choice(STATES[qualifier]), clues
    clues = replace(clues, qualifier_in_text=qualifier != "nominal")
    if qualifier in ("test", "maintenance") or rng.random() < 0.5:
        return situation, "", clues
    return situation, rng.choice(STATES["running"]), clues


def _draw_repeats(rng: random.Random, situation: Situation, clues: Clues) -> tuple[Situation, int | None, Clues]:
    if situation.qualifier in ("test", "nominal"):
        return situation, None, clues
    draw = rng.random()
    if draw < 0.1:
        return replace(situation, repeated=True), rng.randrange(REPEATS_THAT_RAISE, 60), clues
    if draw < 0.2 and not clues.code_only:
        return replace(situation, repeated=True), None, replace(clues, repeats_in_text=True)
    if draw < 0.35:
        return situation, rng.randrange(1, REPEATS_THAT_RAISE), clues
    if draw < 0.43 and not clues.code_only:
        return situation, None, replace(clues, repeats_in_text=False)
    return situation, None, clues


def _draw_order(rng: random.Random, split: Split) -> str:
    language: Language = "de" if rng.random() < 1 / 3 else "en"
    wish = rng.choice((*SEVERITIES, *ACTIONS, *CATEGORIES, "false", "true", "info", "low", "nothing", "ok"))
    if split == "train" and rng.random() < 0.6:
        return planted_order(rng, language, wish)
    return rng.choice(ORDERS[language][split]).format(a=wish)


def _draw_code(rng: random.Random, split: Split, situation: Situation, severity: str, clues: Clues) -> str:
    mode = situation.mode
    if mode is not None and mode.name in SAFETY_CODES and severity in ("high", "critical") and rng.random() < 0.2:
        return SAFETY_CODES[mode.name]
    if not clues.code_only and rng.random() < 0.3:
        return ""
    telling = mode is not None and mode.codes and situation.qualifier != "nominal"
    if mode is not None and telling and (clues.code_only or rng.random() < 0.6):
        return fill(rng.choice(_CODE_FORMATS[split]), rng, {"k": rng.choice(mode.codes)})
    return fill(rng.choice(_MEANINGLESS_CODES[split]), rng, {})


def _value_text(rng: random.Random, measured: Event) -> str:
    if "value" not in measured:
        return ""
    unit = measured.get("unit", "")
    return rng.choice((f"{measured['value']} {unit}", f"val={measured['value']}", f"{measured['value']}{unit}")).strip()


def fill(template: str, rng: random.Random, words: dict[str, str]) -> str:
    """Fill a name template: ``{d}``..``{d4}`` digits, ``{C}`` a capital letter, ``{T}`` the word in capitals."""
    slots = {f"d{n}": str(rng.randrange(10 ** (n - 1), 10**n)) for n in (2, 3, 4)}
    slots |= {"d": str(rng.randrange(1, 10)), "C": rng.choice("ABCDEFGKLMPRSTX")}
    if "t" in words:
        slots["T"] = words["t"].upper()
    return template.format(**slots, **words)
