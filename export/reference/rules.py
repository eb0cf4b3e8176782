"""What an engineer would decide: from the latent situation behind an event to the triage answer.

The generator draws a `Situation`, writes an event that shows it, and labels the event with `decide`. The rules
are the single source of the labels; docs/reference-model.md prints the same table for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CATEGORIES = (
    "mechanical",
    "electrical",
    "thermal",
    "hydraulic",
    "pneumatic",
    "control",
    "network",
    "safety",
    "material",
    "unknown",
)
SEVERITIES = ("info", "low", "medium", "high", "critical")
ACTIONS = ("log", "monitor", "schedule", "inspect", "call", "stop")
COMPONENTS = (
    "bearing",
    "gearbox",
    "belt",
    "spindle",
    "tool",
    "gripper",
    "motor",
    "drive",
    "supply",
    "heater",
    "fan",
    "coolant",
    "pump",
    "seal",
    "filter",
    "valve",
    "compressor",
    "controller",
    "sensor",
    "switch",
    "door",
    "estop",
    "curtain",
    "feeder",
    "unknown",
)

NOTICE, WARNING, ALARM, FAILURE = range(4)
BAND_LOWER_BOUNDS_PERCENT = (5, 20, 50)
"""Where warning, alarm and failure begin, in percent beyond the limit in the bad direction."""

REPEATS_THAT_RAISE = 5
"""From this many repeats an hour the severity rises by one step."""

Qualifier = Literal["none", "test", "maintenance", "cleared", "nominal"]
Decision = dict[str, str | bool]


@dataclass(frozen=True)
class Mode:
    """One way to fail, with the words people use for it.

    Args:
        name: identifier, for statistics and tests.
        category: the answer's category.
        components: which components can fail this way; empty when the words name no component.
        np_en, vp_en, np_de, vp_de: noun phrases ("excessive vibration") and predicates ("is vibrating").
        codes: mnemonics that machine builders use for this mode.
        shift: severity steps added to the band (-1 for slow, harmless modes, +1 for dangerous ones).
        implied: the band that the words themselves imply ("seized" is a failure), or None.
        wear: planned replacement or refill is the right answer while it is not urgent.
        quantity: (unit, lowest limit, highest limit) triples; empty when nothing is measured.
        direction: +1 when too much is bad, -1 when too little is bad.
        anonymous: whether people also report it without naming a component.
        while_moving: a hazard only while the machine moves (an open door at standstill is not one).
        halts: whether the fault itself has already stopped the machine.
    """

    name: str
    category: str
    components: tuple[str, ...]
    np_en: tuple[str, ...]
    vp_en: tuple[str, ...]
    np_de: tuple[str, ...]
    vp_de: tuple[str, ...]
    codes: tuple[str, ...] = ()
    shift: int = 0
    implied: int | None = None
    wear: bool = False
    quantity: tuple[tuple[str, float, float], ...] = ()
    direction: int = 1
    anonymous: bool = False
    while_moving: bool = False
    halts: bool = False


@dataclass(frozen=True)
class Situation:
    """The truth behind one event.

    Args:
        mode: what is failing, or None when the event does not let anyone tell.
        component: which component, or None when the event does not say.
        stated: the band that adjectives and tags claim, or None.
        deviation_percent: signed deviation of value from limit as the device computes it, or None.
        repeated: many repeats or hours of duration.
        qualifier: whether it is a test, under maintenance, already cleared, or a check without finding.
        halted: whether the machine is known not to be moving.
        injected: whether the text tries to give orders to its reader.
    """

    mode: Mode | None
    component: str | None
    stated: int | None = None
    deviation_percent: int | None = None
    repeated: bool = False
    qualifier: Qualifier = "none"
    halted: bool = False
    injected: bool = False


def deviation_percent(value: float, limit: float) -> int:
    """Signed percent of ``value`` beyond ``limit``, rounded and clamped exactly as the task's deviation line."""
    return max(-999, min(999, round((value - limit) / abs(limit) * 100)))


def measured_band(situation: Situation) -> int | None:
    """The band that the measurement shows, None without one; within limits counts as a notice."""
    if situation.deviation_percent is None or situation.mode is None:
        return None
    beyond = situation.deviation_percent * situation.mode.direction
    return sum(beyond >= bound for bound in BAND_LOWER_BOUNDS_PERCENT)


def contradictory(situation: Situation) -> bool:
    """Whether words and measurement differ by two bands or more."""
    measured = measured_band(situation)
    return measured is not None and situation.stated is not None and abs(measured - situation.stated) >= 2


def decide(situation: Situation) -> Decision:
    """The right answer to a situation, fields in the order of the task's output schema."""
    mode = situation.mode
    category = mode.category if mode else "unknown"
    component = situation.component or "unknown"
    severity = _severity(situation)
    # A drill, a closed alarm or a clean check asks nobody to look again, unless someone planted orders in it.
    suppressed = severity == 0 or situation.qualifier in ("test", "cleared", "nominal")
    urgent = severity == 4 or (category == "safety" and severity >= 3)
    doubtful = component == "unknown" or contradictory(situation)
    return {
        "category": category,
        "severity": SEVERITIES[severity],
        "action": _action(situation, severity),
        "escalate": situation.injected or (not suppressed and (urgent or doubtful)),
        "component": component,
    }


def _severity(situation: Situation) -> int:
    mode, qualifier = situation.mode, situation.qualifier
    if qualifier in ("test", "nominal"):
        return 0
    if qualifier == "cleared":
        return 1 if situation.repeated else 0
    # A guard that is open because people work behind it is still a guard that is open.
    if qualifier == "maintenance" and (mode is None or mode.category != "safety"):
        return 0
    if mode is not None and mode.while_moving:
        return 1 if situation.halted or qualifier == "maintenance" else 4
    bands = [b for b in (situation.stated, measured_band(situation), mode.implied if mode else None) if b is not None]
    # An alarm with neither an adjective nor a measurement is a warning: somebody configured it for a reason.
    band = max(bands, default=WARNING)
    shift = mode.shift if mode else 0
    return max(1, min(4, band + 1 + shift + int(situation.repeated)))


def _action(situation: Situation, severity: int) -> str:
    wear = situation.mode is not None and situation.mode.wear
    if severity == 0:
        return "log"
    if wear and severity <= 2 and situation.qualifier != "cleared":
        return "schedule"
    if severity == 4:
        stands_still = situation.halted or (situation.mode is not None and situation.mode.halts)
        return "call" if stands_still else "stop"
    return {1: "monitor", 2: "inspect", 3: "call"}[severity]
