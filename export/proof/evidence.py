"""What ran is a value, and the word for it follows from it: nobody writes *executed* by hand.

executed     the target's own provider answered, on the target's own kind of machine, and answered rightly
emulated     the same under an emulator that the target names
compiled     the vendor's compiler accepted the graphs; nothing of them ran
unverified   everything else, however close: another provider, another machine, too many other decisions
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from edge_agent.errors import PermanentError
from export.boards import Board, Verification

WEAKEST_FIRST: tuple[Verification, ...] = get_args(Verification)

_HEXAGON_PROVIDER = "QNNExecutionProvider"
_HEXAGON_EMULATOR = "htp"
_X86 = frozenset({"x86_64", "AMD64"})


@dataclass(frozen=True)
class Evidence:
    """One thing that was done with a bundle's graphs.

    Args:
        target: the target that the graphs were made for.
        provider: execution provider that ran them; None where nothing ran.
        machine: what it ran (or was compiled) on, as `platform.machine` says there.
        emulator: what stood in for the target's hardware; None on the machine itself.
        device: model of the board, the processor that was emulated or the SoC that was compiled for, where known.
        compiler: vendor's compiler that made a binary of the graphs, e.g. ``qnn``; None where there was none.
        onnxruntime: version of the library.
        events: events that were answered.
        same: those of them that were decided as they must be.
    """

    target: str
    machine: str
    onnxruntime: str
    provider: str | None = None
    emulator: str | None = None
    device: str | None = None
    compiler: str | None = None
    events: int = 0
    same: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.same <= self.events or (self.events and self.provider is None):
            raise ValueError(f"no such run: {self}")
        if self.emulator is None and self.provider == _HEXAGON_PROVIDER and self.machine in _X86:
            # No x86 machine has a Hexagon: Qualcomm's library for it is an emulator and does not say so itself.
            object.__setattr__(self, "emulator", _HEXAGON_EMULATOR)

    @property
    def agreement(self) -> float:
        """Share of the events that were decided as they must be, 0 when there were none."""
        return self.same / self.events if self.events else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON form without what is unknown: no clock, path or host name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def verification(board: Board, *evidence: Evidence) -> Verification:
    """The strongest word that what was done allows.

    Args:
        board: the target.
        evidence: all that was done.

    Returns:
        Never more than what ran.
    """
    return max((_word(board, one) for one in evidence), key=WEAKEST_FIRST.index, default="unverified")


def check_agreement(board: Board, evidence: Evidence) -> None:
    """Refuse a bundle that decides otherwise on its target.

    Raises:
        PermanentError: ``export.decisions_differ`` when fewer events than the target's floor were decided as they
            must be.
    """
    if evidence.events and evidence.agreement < board.agreement_floor:
        where = evidence.emulator or evidence.machine
        raise PermanentError(
            "export.decisions_differ",
            f"{evidence.provider} on {where} decides {evidence.same} of {evidence.events} golden events as it must: "
            f"below the floor of {board.agreement_floor:.0%} for {board.name}",
            **evidence.as_dict(),
        )


def run_here(board: Board, providers: Iterable[str], onnxruntime: str, *, events: int, same: int) -> Evidence:
    """Evidence of a run in this very process.

    Args:
        board: the target of the bundle.
        providers: those of the session, strongest first.
        onnxruntime: version of the library.
        events: events that were answered.
        same: those that were decided as they must be.
    """
    from export.proof.witness import machine_facts

    facts = machine_facts()
    return Evidence(
        target=board.name,
        provider=next(iter(providers)),
        machine=facts["machine"] or platform.machine(),
        emulator=facts["emulator"],
        device=facts["device"],
        onnxruntime=onnxruntime,
        events=events,
        same=same,
    )


def _word(board: Board, evidence: Evidence) -> Verification:
    if evidence.target != board.name or (evidence.events and evidence.agreement < board.agreement_floor):
        return "unverified"
    if evidence.events and evidence.provider == board.execution_provider:
        if evidence.emulator in board.emulators:
            return "emulated"
        if evidence.emulator is None and evidence.machine in board.machines:
            return "executed"
    return "compiled" if evidence.compiler in board.compilers else "unverified"
