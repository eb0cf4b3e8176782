"""Who answers the golden examples: this process where it can run the target, and whoever else the target names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import EdgeError, RefusedError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.boards import Board
from export.pipeline import Progress
from export.proof.arm64 import CPUS, arm64_interpreter
from export.proof.evidence import Evidence, check_agreement, run_here
from export.proof.measure import DEADLINE_S, THREADS
from export.proof.testimony import Interpreter, prove_golden, prove_on_cpu


@dataclass(frozen=True)
class Elsewhere:
    """Interpreters beside this one, where the user has them.

    Args:
        arm64_root: a root of ``.ci/arm64_root.sh``, whose Python runs under an emulator.
        openvino_python: the Python of an environment with onnxruntime-openvino.
    """

    arm64_root: Path | None = None
    openvino_python: Path | None = None

    def interpreters(self, board: Board) -> Iterator[Interpreter]:
        """Those that can say something about the target."""
        if board.proof == "qemu-arm64" and self.arm64_root is not None:
            yield from (arm64_interpreter(self.arm64_root, cpu) for cpu in CPUS)
        if board.proof == "openvino-venv" and self.openvino_python is not None:
            # Not resolved: a virtual environment is known by its own path to the interpreter.
            yield Interpreter((str(self.openvino_python.absolute()),))


def gather_evidence(board: Board, bundle: Path, elsewhere: Elsewhere, progress: Progress) -> list[Evidence]:
    """Have the golden examples answered by everyone who can, and refuse a bundle that anyone answers wrongly.

    Args:
        board: the target.
        bundle: unsigned.
        elsewhere: further interpreters.
        progress: is told what was shown.

    Raises:
        RefusedError: ``export.golden_failed``.
        PermanentError: ``export.decisions_differ``, ``export.arm64_root_missing``, ``export.proof_failed``.
    """
    here = _answer_here(board, bundle)
    found = [] if here is None else [here]
    found += [prove_golden(interpreter, bundle) for interpreter in elsewhere.interpreters(board)]
    if not found and board.source == "fused":
        # Nobody here has such hardware. The CPU shows at least whether the graphs are right.
        found = [prove_on_cpu(bundle)]
    for one in found:
        check_agreement(board, one)
    for one in found:
        where = f"{one.machine}, {one.emulator}" if one.emulator else one.machine
        right = (
            f"{one.same} of {one.events} golden examples right" if one.events else "loads; no golden examples to answer"
        )
        progress.line(f"engine: {right} with {one.provider} ({where})")
    return found


def _answer_here(board: Board, bundle: Path) -> Evidence | None:
    """Load the bundle with the device's engine and refuse what a device's trial would refuse."""
    try:
        engine = Engine(open_installed_bundle(bundle, read_manifest(bundle)[1]), THREADS)
    except EdgeError as error:
        if error.code == "bundle.unsupported" and board.proof != "local":
            return None  # this machine has no such hardware, and no library for it
        raise
    wrong: list[str] = []
    total = 0
    for name in engine.tasks:
        for number, example in enumerate(engine.golden(name), start=1):
            total += 1
            # Without the task's deadline: a busy build machine says nothing about a device's speed.
            answer = engine.decide(name, dict(example.event), deadline_s=DEADLINE_S)
            if answer.decision != example.decision:
                wrong.append(
                    f"golden example {number} of task {name!r} is answered {answer.decision}, not {example.decision}"
                )
    if total and 1 - len(wrong) / total < board.agreement_floor:
        raise RefusedError("export.golden_failed", wrong[0], wrong=len(wrong), events=total)
    return run_here(board, engine.facts().providers, onnxruntime.__version__, events=total, same=total - len(wrong))
