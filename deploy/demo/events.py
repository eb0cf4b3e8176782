"""A plant's events: a seeded stream of what presses, mills, robots, ovens and pumps report, in two languages."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Mix = Literal["steady", "flood", "load"]
LONG_TEXT_CHARS = 158


@dataclass(frozen=True)
class _Fault:
    code: str
    unit: str
    limit: float
    typical: tuple[float, float]
    texts: tuple[str, ...]


_MACHINES = {
    "press-4": "hydraulic", "press-7": "hydraulic", "mill-2": "spindle", "robot-11": "drive", "oven-1": "thermal",
    "pump-5": "hydraulic", "conveyor-9": "drive", "plc-line3": "network", "cell-6": "safety",
}  # fmt: skip
_FAULTS: dict[str, tuple[_Fault, ...]] = {
    "hydraulic": (
        _Fault("E217", "bar", 180.0, (120.0, 175.0), ("hydraulic pressure low for 12 s", "Hydraulikdruck zu niedrig")),
        _Fault("E231", "l/min", 4.0, (4.2, 9.0), ("oil leak at cylinder seal", "Ölverlust an der Zylinderdichtung")),
    ),
    "spindle": (
        _Fault("V104", "mm/s", 4.5, (4.6, 9.5), ("spindle vibration high", "Lagergeräusch an der Hauptspindel")),
        _Fault("T310", "", 1.0, (1.0, 1.0), ("tool worn, surface out of tolerance", "Fräser verschlissen")),
    ),
    "drive": (
        _Fault("F07", "A", 16.0, (16.5, 24.0), ("motor overcurrent on axis 2", "Umrichter meldet Überstrom")),
        _Fault("B12", "mm", 3.0, (3.2, 8.0), ("belt drifting to the left", "Förderband läuft schief")),
    ),
    "thermal": (
        _Fault("T880", "C", 210.0, (214.0, 260.0), ("zone 3 heater overshoots", "Heizzone 3 zu heiß")),
        _Fault("T121", "C", 60.0, (61.0, 80.0), ("cabinet fan not turning", "Schaltschranklüfter steht")),
    ),
    "network": (
        _Fault("N404", "ms", 50.0, (60.0, 900.0), ("profinet device lost, retrying", "Switch antwortet nicht")),
    ),
    "safety": (
        _Fault("F-STOP", "", 1.0, (1.0, 1.0), ("emergency stop pressed at station 6", "Not-Halt ausgelöst")),
        _Fault("GUARD-BYP", "", 1.0, (1.0, 1.0), ("guard door opened while running", "Schutztür offen im Betrieb")),
    ),
}  # fmt: skip
_STATES = ("running", "idle", "setup", "fault")


class EventStream:
    """Endless events, each with its own id.

    Args:
        seed: equal seeds give equal streams.
    """

    def __init__(self, seed: int = 20) -> None:
        self._random = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self._count = 0
        self._burst: dict[str, Any] | None = None
        self._repeats = 0

    def next(self, mix: Mix) -> dict[str, Any]:
        """The next event.

        Args:
            mix: ``steady`` is varied and short; ``flood`` is mostly one fault repeating, with machine dumps in between;
                ``load`` is one third dumps.
        """
        self._count += 1
        event = self._flood() if mix == "flood" else self._fresh()
        if self._random.random() < {"steady": 0.0, "flood": 0.08, "load": 0.34}[mix]:
            event = {**event, "text": self._dump()}
        return {"id": f"plant-{self._count:06d}", **event}

    def _fresh(self) -> dict[str, Any]:
        machine = self._random.choice(list(_MACHINES))
        fault = self._random.choice(_FAULTS[_MACHINES[machine]])
        return {
            "machine": machine,
            "code": fault.code,
            "state": self._random.choice(_STATES),
            "unit": fault.unit or None,
            "value": round(self._random.uniform(*fault.typical), 1),
            "limit": fault.limit,
            "text": self._random.choice(fault.texts),
        }

    def _flood(self) -> dict[str, Any]:
        # A flood is one cause seen many times: the same alarm in bursts, its counter rising.
        if self._burst is None or self._random.random() < 0.1:
            self._burst, self._repeats = self._fresh(), 0
        self._repeats += 1
        return {**self._burst, "count": self._repeats}

    def _dump(self) -> str:
        """What a drive writes when it faults: a register dump. Digits are a token each, so this is a long event."""
        words = ["fault dump"]
        while len(" ".join(words)) < LONG_TEXT_CHARS - 9:
            words.append(f"{self._random.randrange(10**8):08d}")
        return " ".join(words)
