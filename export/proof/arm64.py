"""Runs bundles on an emulated 64-bit Arm: the official aarch64 wheels under QEMU, in a root of `.ci/arm64_root.sh`.

Right for what is decided, meaningless for how fast: emulation takes hundreds of times longer than this machine does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edge_agent.contract.event import Event
from edge_agent.errors import PermanentError
from export.proof.testimony import Interpreter, Testimony, ask

EMULATOR = "qemu-aarch64-static"
DEFAULT_ROOT = Path("build/arm64-root")

Cpu = Literal["cortex-a72", "cortex-a76"]
"""The processor of a Raspberry Pi 4, and that of a Raspberry Pi 5, which adds int8 dot products and half floats."""
CPUS: tuple[Cpu, ...] = ("cortex-a72", "cortex-a76")


def arm64_interpreter(root: Path, cpu: Cpu = "cortex-a72") -> Interpreter:
    """The Python of an arm64 root.

    Args:
        root: made by ``.ci/arm64_root.sh``.
        cpu: whose instructions are emulated.

    Raises:
        PermanentError: ``export.arm64_root_missing`` when there is no such root, or no emulator.
    """
    root = root.resolve()
    python, face = root / "usr/bin/python3", root / "cpus" / cpu
    emulator = shutil.which(EMULATOR)
    if emulator is None or not python.is_file() or not face.is_dir():
        what = f"no {EMULATOR} on the path" if emulator is None else f"no arm64 root at {root}"
        raise PermanentError("export.arm64_root_missing", what, path=str(root))
    return Interpreter(
        command=(emulator, "-cpu", cpu, "-L", str(face), str(python)),
        python_path=(root / "site",),
        # Nothing of this machine's: its library paths lead to libraries of another machine.
        environment={"PATH": os.defpath, "PYTHONPYCACHEPREFIX": str(root / "pycache")},
        device=cpu,
    )


def run_in_arm64(
    root: Path, bundle: Path, task: str, events: Sequence[Event], cpu: Cpu = "cortex-a72"
) -> tuple[dict[str, Any] | None, ...]:
    """Decide events on an emulated Arm.

    Args:
        root: made by ``.ci/arm64_root.sh``.
        bundle: made for ``cpu-arm64`` (or ``cpu-x86_64``: the graphs are the same).
        task: one of its tasks.
        events: what to decide.
        cpu: whose instructions are emulated.

    Returns:
        One decision an event, None where it could not be decided.

    Raises:
        PermanentError: ``export.arm64_root_missing``, ``export.proof_failed`` or what the bundle is refused with.
    """
    testimony: Testimony = ask(arm64_interpreter(root, cpu), bundle, [(task, event) for event in events])
    return testimony.decisions
