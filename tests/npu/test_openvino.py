"""The static graphs on OpenVINO's CPU device, by the device's own engine in an environment of its own.

Needs ``build/openvino``, which ``.ci/openvino_venv.sh`` makes.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edge_agent.errors import PermanentError
from edge_agent.runtime.engine import Engine
from export.boards import load_boards
from export.npu.windows import StaticModel
from export.proof.evidence import check_agreement, verification
from export.proof.testimony import Interpreter, ask, prove_golden, this_interpreter
from tests.npu.conftest import REPOSITORY, MakeBundle
from tests.npu.test_qnn import decisions, held_out

ENVIRONMENT = "build/openvino"
PYTHON = REPOSITORY / ENVIRONMENT / "bin/python"
UNSEEN_EVENTS = 100

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.needs(f"path:{ENVIRONMENT}/recipe")]


@pytest.fixture(scope="module")
def bundle(static: StaticModel, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(static, "openvino", tmp_path_factory.mktemp("openvino"))


def test_openvino_decides_every_golden_event_as_it_must(bundle: Path) -> None:
    board = load_boards()["openvino"]
    evidence = prove_golden(Interpreter((str(PYTHON),)), bundle)
    # Kernels of ONNX Runtime itself are forbidden to help: what this provider names, OpenVINO ran.
    assert (evidence.provider, evidence.emulator) == ("OpenVINOExecutionProvider", None)
    assert (evidence.events, evidence.same) == (24, 24)
    check_agreement(board, evidence)
    assert verification(board, evidence) == board.verification == "executed"


def test_openvino_decides_unseen_events_as_the_fused_graph_does(bundle: Path, fused: Engine) -> None:
    events = held_out(UNSEEN_EVENTS)
    found = ask(Interpreter((str(PYTHON),)), bundle, [("triage", event) for event in events]).decisions
    expected = decisions(fused, events)
    assert sum(left == right for left, right in zip(found, expected, strict=True)) >= 0.99 * UNSEEN_EVENTS


def test_ordinary_onnxruntime_refuses_the_target_instead_of_taking_its_own_kernels(bundle: Path) -> None:
    with pytest.raises(PermanentError, match="no provider for target openvino") as caught:
        prove_golden(this_interpreter(), bundle)
    assert caught.value.code == "bundle.unsupported"


def test_environment_holds_nothing_that_reports_home() -> None:
    listing = subprocess.run([PYTHON, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime-openvino" in listing
    assert "openvino-telemetry" not in listing
    # Intel's and the ordinary build share a module name: with both, either may be the one that runs.
    assert "onnxruntime " not in listing


@pytest.mark.needs("strace")
def test_openvino_opens_no_connection(bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    prove_golden(Interpreter(("strace", "-f", "-e", "trace=%network", "-o", str(trace), str(PYTHON))), bundle)
    assert "AF_INET" not in trace.read_text()
