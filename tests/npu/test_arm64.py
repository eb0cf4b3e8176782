"""The artifact on 64-bit Arm: ONNX Runtime's official aarch64 wheel under QEMU, as on a Raspberry Pi 4 and 5.

Needs ``build/arm64-root``, which ``.ci/arm64_root.sh`` makes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import edge_agent
from edge_agent.contract.manifest import read_manifest
from export.boards import load_boards
from export.proof.arm64 import CPUS, DEFAULT_ROOT, Cpu, arm64_interpreter, run_in_arm64
from export.proof.evidence import verification
from export.proof.testimony import ask, prove_golden, retarget, this_interpreter
from export.reference.bundle_build import built, reference_request

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / DEFAULT_ROOT
REFERENCE = REPOSITORY / "export/reference/bundle"
HELD_OUT = REPOSITORY / "export/reference/data/heldout.jsonl"
HELD_OUT_EVENTS = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.needs("qemu-aarch64-static", f"path:{DEFAULT_ROOT}/recipe"),
]


@pytest.fixture
def arm64_bundle(tmp_path: Path) -> Path:
    """The reference bundle's very files under a manifest for Arm."""
    return retarget(REFERENCE, "cpu-arm64", tmp_path)


@pytest.mark.parametrize("cpu", CPUS)
def test_every_golden_decision_on_emulated_arm_equals_x86(cpu: Cpu, arm64_bundle: Path) -> None:
    board = load_boards()["cpu-arm64"]
    run = prove_golden(arm64_interpreter(ROOT, cpu), arm64_bundle)
    here = prove_golden(this_interpreter(), REFERENCE)
    assert (run.machine, run.emulator, run.device) == ("aarch64", "qemu-aarch64", cpu)
    assert run.provider == "CPUExecutionProvider"
    assert run.onnxruntime == here.onnxruntime
    # Both are held against the same golden decisions: all right on both sides is equal on both sides.
    assert (run.events, run.same) == (here.events, here.same) == (24, 24)
    assert verification(board, run) == board.verification == "emulated"


def test_decisions_on_unseen_events_are_those_of_x86(arm64_bundle: Path) -> None:
    with HELD_OUT.open(encoding="utf-8") as reader:
        events = [json.loads(line)["event"] for line in itertools.islice(reader, HELD_OUT_EVENTS)]
    task = read_manifest(arm64_bundle)[0].tasks[0]
    here = ask(this_interpreter(), REFERENCE, [(task, event) for event in events]).decisions
    assert None not in here
    assert run_in_arm64(ROOT, arm64_bundle, task, events, "cortex-a76") == here


def test_eight_bits_by_rows_decide_on_emulated_arm_as_they_must() -> None:
    request = reference_request("int8", quality={})
    with built(replace(request, identity=replace(request.identity, target="cpu-arm64"))) as bundle:
        for cpu in CPUS:
            run = prove_golden(arm64_interpreter(ROOT, cpu), bundle)
            assert (run.machine, run.device) == ("aarch64", cpu)
            assert (run.events, run.same) == (24, 24)


def test_the_command_itself_runs_on_arm() -> None:
    interpreter = arm64_interpreter(ROOT)
    package = Path(edge_agent.__file__).resolve().parents[1]
    event = (REFERENCE / "tasks/triage/golden.jsonl").read_text("utf-8").splitlines()[0]
    arguments = ["decide", "--bundle", str(REFERENCE), "--deadline-s", "100", "--threads", "1"]
    done = subprocess.run(
        [*interpreter.command, "-m", "edge_agent", *arguments, json.dumps(json.loads(event)["event"])],
        env={
            **interpreter.environment,
            "PYTHONPATH": os.pathsep.join(map(str, [*interpreter.python_path, package])),
            "ORT_DISABLE_TELEMETRY": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decision"] == json.loads(event)["decision"]
