"""What is said of a target: never more than what ran, and nothing that no test has earned."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import EdgeError
from export.boards import TARGETS_DIR, Board, Verification, load_boards
from export.proof.arm64 import arm64_interpreter
from export.proof.evidence import WEAKEST_FIRST, Evidence, check_agreement, run_here, verification
from export.proof.testimony import Interpreter, ask, prove_golden, this_interpreter

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "export/reference/bundle"
BOARDS = load_boards()
ARM64, X86, JETSON, HTP = (BOARDS[name] for name in ("cpu-arm64", "cpu-x86_64", "cuda-jetson", "qnn-htp"))

MACHINES = ("x86_64", "aarch64", "AMD64", "riscv64")
PROVIDERS = tuple(sorted({board.execution_provider for board in BOARDS.values()}))
EMULATORS = (None, "qemu-aarch64", "qemu-riscv64", "htp")


@st.composite
def runs(draw: st.DrawFn) -> Evidence:
    """Anything that could have been done, likely or not."""
    events = draw(st.integers(0, 200))
    return Evidence(
        target=draw(st.sampled_from(tuple(BOARDS))),
        provider=draw(st.sampled_from(PROVIDERS)),
        machine=draw(st.sampled_from(MACHINES)),
        emulator=draw(st.sampled_from(EMULATORS)),
        compiler=draw(st.sampled_from((None, "qnn", "trtexec"))),
        onnxruntime="1.32.0",
        events=events,
        same=draw(st.integers(0, events) | st.just(events)),
    )


boards = st.sampled_from(tuple(BOARDS.values()))


def strength(word: Verification) -> int:
    return WEAKEST_FIRST.index(word)


def arm_run(**changes: Any) -> Evidence:
    run = Evidence("cpu-arm64", "aarch64", "1.32.0", provider="CPUExecutionProvider", events=24, same=24)
    return replace(run, **changes)


@given(boards, st.lists(runs(), max_size=4))
def test_no_word_exceeds_what_ran(board: Board, done: list[Evidence]) -> None:
    word = verification(board, *done)
    mine = [one for one in done if one.target == board.name]
    answered = [
        one
        for one in mine
        if one.events and one.provider == board.execution_provider and one.same >= board.agreement_floor * one.events
    ]
    if word == "executed":
        assert any(one.machine in board.machines and one.emulator is None for one in answered)
    if word == "emulated":
        assert any(one.emulator in board.emulators for one in answered)
    if word == "compiled":
        assert any(one.compiler in board.compilers for one in mine)


@given(boards, st.lists(runs(), max_size=3), runs())
def test_more_evidence_never_weakens_and_is_worth_no_more_than_itself(
    board: Board, done: list[Evidence], more: Evidence
) -> None:
    before, alone, together = (strength(verification(board, *some)) for some in (done, [more], [*done, more]))
    assert together == max(before, alone)


@given(boards, runs())
def test_emulated_run_is_never_called_executed(board: Board, run: Evidence) -> None:
    if run.emulator is not None:
        assert verification(board, run) != "executed"


@given(boards, runs())
def test_too_many_other_decisions_are_worth_nothing_and_stop_the_build(board: Board, run: Evidence) -> None:
    if run.events and run.same / run.events < board.agreement_floor:
        assert verification(board, run) == "unverified"
        with pytest.raises(EdgeError, match=r"^export\.decisions_differ"):
            check_agreement(board, run)
    else:
        check_agreement(board, run)


def test_nothing_done_is_unverified() -> None:
    assert {verification(board) for board in BOARDS.values()} == {"unverified"}


def test_x86_run_of_the_arm_bundle_stays_unverified() -> None:
    assert verification(ARM64, arm_run()) == "executed"
    assert verification(ARM64, arm_run(machine="x86_64")) == "unverified"
    assert verification(ARM64, arm_run(emulator="qemu-aarch64")) == "emulated"
    assert verification(ARM64, arm_run(target="cpu-x86_64")) == "unverified"


def test_cpu_run_of_the_jetson_bundle_stays_unverified() -> None:
    on_jetson = Evidence("cuda-jetson", "aarch64", "1.32.0", provider="CUDAExecutionProvider", events=24, same=24)
    assert verification(JETSON, on_jetson) == "executed"
    assert verification(JETSON, replace(on_jetson, provider="CPUExecutionProvider")) == "unverified"
    # A server's GPU has other kernels, another library and other memory than a Jetson's.
    assert verification(JETSON, replace(on_jetson, machine="x86_64")) == "unverified"


def test_hexagon_on_x86_is_an_emulator_whether_it_says_so_or_not() -> None:
    run = Evidence("qnn-htp", "x86_64", "1.32.0", provider="QNNExecutionProvider", compiler="qnn", events=24, same=24)
    assert run.emulator == "htp"
    assert verification(HTP, run) == "emulated"
    assert verification(HTP, replace(run, events=0, same=0)) == "compiled"
    assert verification(HTP, replace(run, same=23)) == "unverified"


def test_nine_of_ten_right_decisions_are_no_pass() -> None:
    with pytest.raises(EdgeError, match=r"^export\.decisions_differ.* 90 of 100 ") as failure:
        check_agreement(HTP, Evidence("qnn-htp", "x86_64", "1", provider="QNNExecutionProvider", events=100, same=90))
    assert failure.value.context["emulator"] == "htp"


@pytest.mark.parametrize("counts", [{"events": 3, "same": 4}, {"same": -1}, {"provider": None}])
def test_impossible_evidence_is_no_evidence(counts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no such run"):
        arm_run(**counts)


def test_a_run_in_this_process_names_this_machine() -> None:
    run = run_here(X86, ["CPUExecutionProvider"], "1.32.0", events=24, same=24)
    assert json.loads(json.dumps(run.as_dict())) == run.as_dict()
    assert verification(ARM64, replace(run, target="cpu-arm64")) in {"unverified", "executed"}
    assert (verification(X86, run) == "executed") == (run.machine == "x86_64" and run.emulator is None)


@pytest.mark.needs("machine:x86_64")
def test_reference_bundle_is_executed_on_x86() -> None:
    run = prove_golden(this_interpreter(), REFERENCE)
    assert (run.events, run.emulator) == (24, None)
    assert verification(X86, run) == X86.verification == "executed"
    assert verification(ARM64, replace(run, target="cpu-arm64")) == "unverified"


def test_event_that_cannot_be_decided_counts_against_the_bundle() -> None:
    task = read_manifest(REFERENCE)[0].tasks[0]
    testimony = ask(this_interpreter(), REFERENCE, [(task, {"no": "known field"})])
    assert testimony.decisions == (None,)
    assert testimony.as_evidence("cpu-x86_64", [{"category": "mechanical"}]).same == 0


def test_damaged_bundle_is_refused_elsewhere_too(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((REFERENCE / "manifest.json").read_bytes())
    with pytest.raises(EdgeError, match=r"^bundle\.file_missing"):
        ask(this_interpreter(), tmp_path, [])


@pytest.mark.parametrize("command", [(sys.executable, "-c", "raise SystemExit('no engine here')"), ("/nonexistent",)])
def test_interpreter_that_cannot_answer_proves_nothing(command: tuple[str, ...]) -> None:
    with pytest.raises(EdgeError, match=r"^export\.proof_failed"):
        ask(Interpreter(command), REFERENCE, [])


def test_missing_arm64_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"^export\.arm64_root_missing"):
        arm64_interpreter(tmp_path)


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_every_word_is_asserted_by_the_test_that_the_target_names(board: Board) -> None:
    if board.proved_by is None:
        assert board.verification == "unverified"
        return
    file, _, name = board.proved_by.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    test = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    asserted = [ast.unparse(node.test) for node in ast.walk(test) if isinstance(node, ast.Assert)]
    wanted = (f".verification == '{board.verification}'", "verification(")
    assert any(all(part in one for part in wanted) for one in asserted), f"{board.proved_by} asserts no such word"
    assert not any("skip" in ast.unparse(decorator) for decorator in test.decorator_list)


@pytest.mark.parametrize(
    "change",
    [
        {"verification": "executed"},  # no test named
        {"proved_by": "tests/export/test_targets.py::test_nothing"},  # nothing claimed
        {"verification": "emulated", "proved_by": "x::y"},  # no emulator named
        {"verification": "compiled", "proved_by": "x::y"},  # no compiler named
        {"verification": "certified"},
        {"agreement_floor": 0.9},
        {"source": "portable"},
        {"machines": []},
        {"memory_budget_bytes": 0},
        {"surprise": 1},
        {"name": "cpu-arm64"},
    ],
)
def test_target_file_that_contradicts_itself_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    fields = tomllib.loads((TARGETS_DIR / "cuda-jetson.toml").read_text("utf-8")) | {"verification": "unverified"}
    fields.pop("proved_by", None)
    (tmp_path / "cuda-jetson.toml").write_text(to_toml(fields))
    assert list(load_boards(tmp_path)) == ["cuda-jetson"]
    (tmp_path / "cuda-jetson.toml").write_text(to_toml(fields | change))
    with pytest.raises(EdgeError, match=r"^export\.target_invalid: cuda-jetson\.toml"):
        load_boards(tmp_path)


def test_windows_of_a_static_target_are_told_widest_first(tmp_path: Path) -> None:
    text = (TARGETS_DIR / "qnn-htp.toml").read_text("utf-8")
    (tmp_path / "qnn-htp.toml").write_text(text.replace("window_tokens = [32, 1]", "window_tokens = [1, 32]"))
    with pytest.raises(EdgeError, match="widest first"):
        load_boards(tmp_path)


def test_precision_and_memory_that_a_target_lacks_are_refused() -> None:
    HTP.check_precision("a16w8")
    with pytest.raises(EdgeError, match=r"^export\.precision_unsupported: qnn-htp takes a16w8, a16w4, not int4"):
        HTP.check_precision("int4")
    ARM64.check_memory(ARM64.memory_budget_bytes)
    with pytest.raises(EdgeError, match=r"^export\.memory_budget"):
        ARM64.check_memory(ARM64.memory_budget_bytes + 1)


def to_toml(fields: dict[str, Any]) -> str:
    # JSON's spelling of text, numbers, booleans and flat lists is TOML's too.
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())
