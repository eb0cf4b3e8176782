"""A table of events that an engineer would agree with."""

from __future__ import annotations

import pytest

from export.reference.generator import ALL_MODES
from export.reference.rules import (
    ALARM,
    CATEGORIES,
    COMPONENTS,
    FAILURE,
    NOTICE,
    WARNING,
    Mode,
    Situation,
    decide,
    deviation_percent,
)

MODES = {mode.name: mode for mode in ALL_MODES}


def _situation(mode: str | None, component: str | None, **facts: object) -> Situation:
    return Situation(MODES[mode] if mode else None, component, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("why", "situation", "expected"),
    [
        (
            "a slight vibration is watched",
            _situation("vibration", "bearing", stated=NOTICE),
            ("mechanical", "low", "monitor", False, "bearing"),
        ),
        (
            "vibration 35 % beyond its limit needs a mechanic",
            _situation("vibration", "bearing", deviation_percent=35),
            ("mechanical", "high", "call", False, "bearing"),
        ),
        (
            "60 % beyond the limit stops a running machine",
            _situation("vibration", "bearing", deviation_percent=60),
            ("mechanical", "critical", "stop", True, "bearing"),
        ),
        (
            "a machine that stands still is not stopped again",
            _situation("vibration", "bearing", deviation_percent=60, halted=True),
            ("mechanical", "critical", "call", True, "bearing"),
        ),
        (
            "an alarm without adjective or measurement is a warning",
            _situation("noise", "gearbox"),
            ("mechanical", "medium", "inspect", False, "gearbox"),
        ),
        (
            "pressure 30 % below its limit is an alarm",
            _situation("oil_pressure_low", "pump", deviation_percent=-30),
            ("hydraulic", "high", "call", False, "pump"),
        ),
        (
            "pressure above a lower limit is within limits",
            _situation("oil_pressure_low", "pump", deviation_percent=30),
            ("hydraulic", "low", "monitor", False, "pump"),
        ),
        (
            "a dirty filter is planned, not hurried",
            _situation("air_filter", "filter", stated=WARNING),
            ("pneumatic", "low", "schedule", False, "filter"),
        ),
        (
            "a worn tool that keeps complaining is still planned work",
            _situation("wear", "tool", stated=WARNING, repeated=True),
            ("mechanical", "medium", "schedule", False, "tool"),
        ),
        (
            "words and measurement that disagree are shown to a person, the worse counts",
            _situation("overheating", "motor", stated=NOTICE, deviation_percent=40),
            ("thermal", "high", "call", True, "motor"),
        ),
        (
            "'critical' within limits: the worse counts, and a person looks",
            _situation("overheating", "motor", stated=FAILURE, deviation_percent=-10),
            ("thermal", "critical", "stop", True, "motor"),
        ),
        (
            "a snapped belt is a failure without further words",
            _situation("breakage", "belt"),
            ("mechanical", "critical", "stop", True, "belt"),
        ),
        (
            "repetition raises by one step",
            _situation("signal", "sensor", stated=WARNING, repeated=True),
            ("control", "high", "call", False, "sensor"),
        ),
        ("a test is logged", _situation("fire", "motor", qualifier="test"), ("safety", "info", "log", False, "motor")),
        (
            "a fault during maintenance is logged",
            _situation("short", "motor", qualifier="maintenance"),
            ("electrical", "info", "log", False, "motor"),
        ),
        (
            "a fire during maintenance is a fire",
            _situation("fire", "motor", qualifier="maintenance"),
            ("safety", "critical", "stop", True, "motor"),
        ),
        (
            "a cleared alarm is logged",
            _situation("air_leak", "valve", stated=ALARM, qualifier="cleared"),
            ("pneumatic", "info", "log", False, "valve"),
        ),
        (
            "a cleared alarm that keeps coming back is watched",
            _situation("air_leak", "valve", repeated=True, qualifier="cleared"),
            ("pneumatic", "low", "monitor", False, "valve"),
        ),
        (
            "an open guard on a moving machine stops it",
            _situation("guard_open", "door"),
            ("safety", "critical", "stop", True, "door"),
        ),
        (
            "an open guard at standstill is normal",
            _situation("guard_open", "door", halted=True),
            ("safety", "low", "monitor", False, "door"),
        ),
        (
            "a pressed emergency stop has stopped the machine already",
            _situation("estop_pressed", "estop"),
            ("safety", "high", "call", True, "estop"),
        ),
        (
            "an emergency stop pressed again and again needs no second stop",
            _situation("estop_pressed", "estop", repeated=True),
            ("safety", "critical", "call", True, "estop"),
        ),
        (
            "no symptom, no component: a person looks",
            _situation(None, None),
            ("unknown", "medium", "inspect", True, "unknown"),
        ),
        (
            "a symptom without a component: a person looks",
            _situation("vibration", None, deviation_percent=3),
            ("mechanical", "low", "monitor", True, "unknown"),
        ),
        (
            "planted orders change nothing but the need to look",
            _situation("noise", "belt", injected=True),
            ("mechanical", "medium", "inspect", True, "belt"),
        ),
        (
            "planted orders in a drill are still shown to a person",
            _situation("noise", "belt", injected=True, qualifier="test"),
            ("mechanical", "info", "log", True, "belt"),
        ),
        (
            "a lost fieldbus station is a network fault of that station",
            _situation("comm_loss", "drive"),
            ("network", "medium", "inspect", False, "drive"),
        ),
        (
            "hydraulic overpressure is one step worse",
            _situation("oil_pressure_high", "valve", stated=WARNING),
            ("hydraulic", "high", "call", False, "valve"),
        ),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else None,
)
def test_engineer_agrees(why: str, situation: Situation, expected: tuple[str | bool, ...]) -> None:
    assert tuple(decide(situation).values()) == expected, why


@pytest.mark.parametrize(
    ("percent", "severity"),
    [(4, "low"), (5, "medium"), (19, "medium"), (20, "high"), (49, "high"), (50, "critical"), (-80, "low")],
)
def test_bands_begin_at_their_bounds(percent: int, severity: str) -> None:
    assert decide(_situation("overcurrent", "motor", deviation_percent=percent))["severity"] == severity


def test_deviation_of_a_negative_limit_keeps_its_sign() -> None:
    assert deviation_percent(-15, -20) == 25
    assert deviation_percent(1e9, 1) == 999


def test_no_code_belongs_to_two_modes() -> None:
    codes = [code for mode in ALL_MODES for code in mode.codes]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("mode", ALL_MODES, ids=lambda mode: mode.name)
def test_mode_speaks_two_languages_and_names_known_values(mode: Mode) -> None:
    assert mode.category in CATEGORIES
    assert mode.components
    assert set(mode.components) <= set(COMPONENTS)
    assert all((mode.np_en, mode.vp_en, mode.np_de, mode.vp_de))
