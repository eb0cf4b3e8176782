"""Has golden examples answered by the engine in another interpreter: an emulated Arm, another ONNX Runtime."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent import fs
from edge_agent.contract.event import Event
from edge_agent.contract.manifest import MANIFEST_NAME, Target, read_manifest
from edge_agent.contract.task import GoldenExample, load_golden, load_task
from edge_agent.errors import PermanentError
from export.proof import witness
from export.proof.evidence import Evidence

DEADLINE_S = 120.0
"""For one event: emulation takes hundreds of times longer than this machine does."""
TIMEOUT_S = 1800.0
GOLDEN_NAME = "golden.jsonl"

_LAST_WORDS = 400


@dataclass(frozen=True)
class Interpreter:
    """A Python that has the device's dependencies.

    Args:
        command: how it is started.
        python_path: folders of packages beside its own.
        environment: its whole environment.
        threads: intra-op threads of its engine.
        device: what it stands for, where it cannot tell by itself: the processor that is emulated.
    """

    command: tuple[str, ...]
    python_path: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    threads: int = 1
    device: str | None = None


@dataclass(frozen=True)
class Testimony:
    """What another interpreter answered, and what it was.

    Args:
        machine: as `platform.machine` says there.
        emulator: what emulated it, None when nothing did.
        device: the board's model where its firmware tells it.
        onnxruntime: version of its library.
        providers: of its session, strongest first.
        decisions: one an event; None where it raised an error.
    """

    machine: str
    emulator: str | None
    device: str | None
    onnxruntime: str
    providers: tuple[str, ...]
    decisions: tuple[dict[str, Any] | None, ...]

    def as_evidence(self, target: str, expected: Sequence[Mapping[str, Any]]) -> Evidence:
        """What was shown, when ``expected`` are the right decisions.

        Args:
            target: the target of the bundle.
            expected: one decision for each event that was asked.
        """
        same = sum(found == dict(wanted) for found, wanted in zip(self.decisions, expected, strict=True))
        return Evidence(
            target=target,
            provider=self.providers[0],
            machine=self.machine,
            emulator=self.emulator,
            device=self.device,
            onnxruntime=self.onnxruntime,
            events=len(expected),
            same=same,
        )


def this_interpreter() -> Interpreter:
    """The one that runs this, in a process of its own."""
    return Interpreter((sys.executable,))


def ask(interpreter: Interpreter, bundle: Path, asked: Sequence[tuple[str, Event]]) -> Testimony:
    """Have events answered elsewhere, by the very engine that runs on devices.

    Args:
        interpreter: who answers.
        bundle: its files are hashed there again; it needs no signature.
        asked: (task, event).

    Returns:
        The answers and what gave them.

    Raises:
        PermanentError: ``export.proof_failed`` when the interpreter does not answer, or what it raised when it could
            not load the bundle.
    """
    request = {
        "bundle": str(bundle.resolve()),
        "digest": read_manifest(bundle)[1],
        "threads": interpreter.threads,
        "deadline_s": DEADLINE_S,
        "asked": list(asked),
    }
    with tempfile.TemporaryDirectory(prefix="edge-export-") as scratch:
        # A folder that holds the device's package alone: beside it may lie libraries of another machine.
        (Path(scratch) / "edge_agent").symlink_to(Path(fs.__file__).resolve().parent)
        reply = _run(interpreter, Path(scratch), json.dumps(request))
    if "error" in reply:
        fault = reply["error"]
        raise PermanentError(fault["code"], fault["detail"])
    return Testimony(
        machine=reply["machine"],
        emulator=reply["emulator"],
        device=reply["device"] or interpreter.device,
        onnxruntime=reply["onnxruntime"],
        providers=tuple(reply["providers"]),
        decisions=tuple(answer.get("decision") for answer in reply["answers"]),
    )


def prove_golden(interpreter: Interpreter, bundle: Path) -> Evidence:
    """Have all golden examples of a bundle answered elsewhere.

    Args:
        interpreter: who answers.
        bundle: whose manifest says for which target it was made.

    Returns:
        What was shown. Whether it suffices is for `export.proof.evidence.check_agreement` to say.

    Raises:
        PermanentError: as `ask`.
    """
    rows: list[tuple[str, GoldenExample]] = []
    manifest, _ = read_manifest(bundle)
    for task in manifest.tasks:
        folder = bundle / "tasks" / task
        if (folder / GOLDEN_NAME).is_file():
            rows += [(task, example) for example in load_golden(folder / GOLDEN_NAME, load_task(folder / "task.yaml"))]
    testimony = ask(interpreter, bundle, [(task, dict(example.event)) for task, example in rows])
    return testimony.as_evidence(manifest.target, [dict(example.decision) for _, example in rows])


def prove_on_cpu(bundle: Path) -> Evidence:
    """Have the golden examples of an accelerator's bundle answered by this machine's CPU.

    That shows whether the graphs are right, and nothing of the accelerator: the evidence names the CPU's provider.

    Args:
        bundle: with dynamic graphs.

    Raises:
        PermanentError: as `ask`.
    """
    target = read_manifest(bundle)[0].target
    here: Target = "cpu-arm64" if platform.machine() in ("aarch64", "arm64") else "cpu-x86_64"
    with tempfile.TemporaryDirectory(prefix="edge-export-") as scratch:
        return replace(prove_golden(this_interpreter(), retarget(bundle, here, Path(scratch))), target=target)


def retarget(bundle: Path, target: Target, folder: Path) -> Path:
    """The same files under a manifest for another target, unsigned, for proofs only.

    Args:
        bundle: whose files are linked to.
        target: what its manifest shall say.
        folder: empty.

    Returns:
        ``folder``.
    """
    manifest, _ = read_manifest(bundle)
    for entry in manifest.files:
        (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / entry.path).symlink_to((bundle / entry.path).resolve())
    (folder / MANIFEST_NAME).write_bytes(replace(manifest, target=target).to_bytes())
    return folder


def _run(interpreter: Interpreter, package: Path, request: str) -> dict[str, Any]:
    path = [*interpreter.python_path, package]
    environment = {
        **interpreter.environment,
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    script = str(Path(witness.__file__).resolve())
    try:
        # -P: the script's own folder holds the exporter, which is not installed there.
        done = subprocess.run(
            [*interpreter.command, "-P", script],
            input=request,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PermanentError("export.proof_failed", f"{interpreter.command[0]}: {error}") from error
    try:
        # The last line only: native libraries have been seen to print on stdout.
        reply: dict[str, Any] = json.loads(done.stdout.rpartition("\n")[2])
    except ValueError as error:
        said = done.stderr.strip()[-_LAST_WORDS:]
        raise PermanentError(
            "export.proof_failed", f"{interpreter.command[0]} ended with {done.returncode}: {said}"
        ) from error
    return reply
