"""Write a situation down: pick a language, a sentence, the cues around it, and the noise of a real log."""

from __future__ import annotations

import random
from dataclasses import dataclass

from export.reference import phrasing
from export.reference.noise import JUNK, add_typos, filler, pseudo_word, punctuation, vary_spelling
from export.reference.phrasing import Language
from export.reference.rules import Mode, Situation
from export.reference.vocabulary import (
    COMPONENT_NOUNS_DE,
    COMPONENT_NOUNS_EN,
    MACHINE_TYPES,
    PLACES_DE,
    PLACES_EN,
    Split,
)

MAX_TEXT_CHARS = 160
LOOSE_SHARE = 0.3
"""Share of training texts whose cues stand among words that decide nothing, in no template's order."""

_SEPARATORS: dict[Split, tuple[str, ...]] = {
    "train": (", ", " - ", ". ", "; ", " | ", " ", ": ", " / ", " ... ", " (", " * ", "  ", " & ", " and ", " _ "),
    "validation": (", ", " > ", " ~ ", ". "),
    "test": (", ", ". ", " -- ", " + ", " // ", "; ", " => ", " plus "),
}


@dataclass(frozen=True)
class Clues:
    """Which parts of a situation the text has to carry, because no field of the event does.

    Args:
        code_only: the code says everything, the text nothing.
        qualifier_in_text: write the qualifier (test, maintenance, cleared) into the text.
        halt_in_text: write into the text that the machine stands still.
        repeats_in_text: True for words of repetition, False for words of a single occurrence, None for neither.
        order: an order planted in the text, or empty.
    """

    code_only: bool = False
    qualifier_in_text: bool = False
    halt_in_text: bool = False
    repeats_in_text: bool | None = None
    order: str = ""


def write_text(rng: random.Random, split: Split, situation: Situation, clues: Clues, *, value: str) -> str:
    """The free text of an event; every cue that decides the label survives the length limit.

    Args:
        rng: source of every choice.
        split: whose templates to use.
        situation: what to say.
        clues: which cues the text has to carry.
        value: the measured value as text, for decoration; may be empty.

    Returns:
        At most `MAX_TEXT_CHARS` characters.
    """
    for _ in range(8):
        text = _compose(rng, split, situation, clues, value)
        if len(text) <= MAX_TEXT_CHARS:
            return text
    return _compose(rng, split, situation, clues, "", plain=True)[:MAX_TEXT_CHARS]


def _compose(
    rng: random.Random, split: Split, situation: Situation, clues: Clues, value: str, *, plain: bool = False
) -> str:
    language: Language = "de" if rng.random() < 0.42 else "en"
    stated = situation.stated
    stage = "" if stated is None else rng.choice(phrasing.STAGES[_mixed(rng, language)][stated])
    # An adjective may sit before the noun ("severe vibration") or stand apart ("ALARM: vibration").
    inside = bool(stage) and rng.random() < 0.45 and situation.mode is not None
    core = _core(rng, split, situation, language, stage if inside else "", value)
    before: list[str] = []
    after: list[str] = []
    if stage and not inside:
        (before if rng.random() < 0.6 else after).append(stage)
    for cue in _cues(rng, split, situation, clues, language):
        (before if rng.random() < 0.3 else after).append(cue)
    if not plain:
        if value and rng.random() < 0.3:
            after.append(value)
        if rng.random() < 0.25:
            junk = _slots(rng, split, rng.choice(JUNK[split]))
            if split == "train" and rng.random() < 0.3:
                junk = " ".join(filler(rng, 3))
            (before if rng.random() < 0.35 else after).append(junk)
    rng.shuffle(before)
    rng.shuffle(after)
    text = _join(rng, split, [*before, core, *after])
    if plain:
        return text
    if rng.random() < (0.2 if split == "train" else 0.1):
        text = add_typos(text, rng, rng.choice((1, 1, 2)))
    return vary_spelling(text, rng)


def _mixed(rng: random.Random, language: Language) -> Language:
    """The other language in one of seven cases: shop floors mix."""
    if rng.random() < 0.14:
        return "en" if language == "de" else "de"
    return language


def _core(rng: random.Random, split: Split, situation: Situation, language: Language, stage: str, value: str) -> str:
    mode = situation.mode
    words = {"v": value, "c": _component(rng, situation.component, _mixed(rng, language))}
    if split == "train" and situation.qualifier != "nominal" and rng.random() < LOOSE_SHARE:
        return _loose_core(rng, mode, words["c"], _mixed(rng, language), stage)
    if mode is None:
        return _slots(rng, split, rng.choice(phrasing.VAGUE[language][split]), words)
    symptom = _mixed(rng, language)
    words["np"] = _noun_phrase(rng, mode, symptom, stage)
    if situation.qualifier == "nominal":
        return _slots(rng, split, rng.choice(phrasing.NOMINAL[language][split]), words)
    if situation.component is None:
        return _slots(rng, split, rng.choice(phrasing.BARE_TEMPLATES[language][split]), words)
    if rng.random() < 0.42:
        predicate = rng.choice(mode.vp_de if symptom == "de" else mode.vp_en)
        words["vp"] = _with_stage(rng, predicate, stage)
        # A predicate decides the language of its sentence, or the grammar breaks.
        return _slots(rng, split, rng.choice(phrasing.VP_TEMPLATES[symptom][split]), words)
    return _slots(rng, split, rng.choice(phrasing.NP_TEMPLATES[language][split]), words)


def _loose_core(rng: random.Random, mode: Mode | None, component: str, language: Language, stage: str) -> str:
    """The cues in any order among fillers; without a mode fillers alone, which name nothing."""
    cues = [component] if component else []
    if mode is not None:
        if component and rng.random() < 0.4:
            cues.append(_with_stage(rng, rng.choice(mode.vp_de if language == "de" else mode.vp_en), stage))
        else:
            cues.append(_noun_phrase(rng, mode, language, stage))
    rng.shuffle(cues)
    words = filler(rng, 4)
    for cue in cues:
        words += [cue, *filler(rng, 3)]
    if not words:
        words = [pseudo_word(rng)]
    text = words[0]
    for word in words[1:]:
        text += (punctuation(rng) if rng.random() < 0.1 else " ") + word
    return text


def _noun_phrase(rng: random.Random, mode: Mode, language: Language, stage: str) -> str:
    phrase = rng.choice(mode.np_de if language == "de" else mode.np_en)
    return f"{stage} {phrase}" if stage else phrase


def _with_stage(rng: random.Random, predicate: str, stage: str) -> str:
    if not stage:
        return predicate
    return rng.choice((f"{predicate} {stage}", f"{predicate} ({stage})", f"{predicate}, {stage}"))


def _component(rng: random.Random, component: str | None, language: Language) -> str:
    if component is None:
        return ""
    noun = rng.choice((COMPONENT_NOUNS_DE if language == "de" else COMPONENT_NOUNS_EN)[component])
    if rng.random() < 0.22:
        place = rng.choice(PLACES_DE if language == "de" else PLACES_EN).format(d=rng.randrange(1, 10))
        return f"{place} {noun}" if rng.random() < 0.5 else f"{noun} {place}"
    return noun


def _cues(rng: random.Random, split: Split, situation: Situation, clues: Clues, language: Language) -> list[str]:
    cues: list[str] = []
    if clues.qualifier_in_text:
        by_language = phrasing.QUALIFIERS[situation.qualifier]
        cues.append(rng.choice(by_language[_mixed(rng, language)][split]))
    if clues.halt_in_text:
        cues.append(rng.choice(phrasing.HALTS[_mixed(rng, language)]))
    if clues.repeats_in_text is not None:
        template = rng.choice(phrasing.REPEATS[_mixed(rng, language)][clues.repeats_in_text])
        cues.append(template.format(d=rng.randrange(2, 10)))
    if clues.order:
        cues.append(clues.order)
    return cues


def _join(rng: random.Random, split: Split, parts: list[str]) -> str:
    text = parts[0]
    separator = rng.choice(_SEPARATORS[split])
    for part in parts[1:]:
        if rng.random() < 0.4:
            separator = rng.choice(_SEPARATORS[split])
        if split == "train" and rng.random() < 0.15:
            separator = rng.choice((punctuation(rng), f" {' '.join(filler(rng, 2))} "))
        text += separator + part + (")" if separator == " (" else "")
    return text


def _slots(rng: random.Random, split: Split, template: str, words: dict[str, str] | None = None) -> str:
    """Fill a sentence template; every ``{d}`` is a digit of its own."""
    filled = words or {}
    machine = machine_type(rng, split)
    text = template
    while "{d}" in text:
        text = text.replace("{d}", str(rng.randrange(10)), 1)
    return text.format(m=machine, **filled)


def machine_type(rng: random.Random, split: Split) -> str:
    """A machine type; in training often an invented one, because the next plant has machines unheard of."""
    if split == "train" and rng.random() < 0.3:
        return pseudo_word(rng)
    return rng.choice(MACHINE_TYPES[split])
