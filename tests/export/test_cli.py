"""The command as a person uses it: results on stdout, talk on stderr, 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.contract.dsse import generate_key, private_key_to_pem
from edge_agent.errors import EdgeError
from edge_agent.runtime.signed_bundle import open_signed_bundle
from export.__main__ import main
from export.boards import TARGETS_DIR, buildable_board, load_boards
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import SHAPES, make_tokenizer, synthesise
from export.signing import load_signing_key
from tests.export.conftest import EVENTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    (tmp_path / "key.pem").write_bytes(private_key_to_pem(generate_key()))
    return tmp_path / "key.pem"


def test_build_sign_and_eval(
    llama: Path, task_folder: Path, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["build", str(llama), "--target", "cpu-x86_64", "--task", str(task_folder), "--out", str(out)]
    assert main([*arguments, "--sign-key", str(key_file), "--json"]) == 0
    printed = capsys.readouterr()
    built = json.loads(printed.out)
    assert built["report"]["precision"] == "int4-k_quant-32"
    assert "engine: 4 of 4 golden examples right with CPUExecutionProvider" in printed.err
    public = load_signing_key(key_file).public_key()
    assert open_signed_bundle(out, [public]).digest == built["digest"]

    assert main(["sign", str(out), "--key", str(key_file)]) == 0
    assert capsys.readouterr().out.strip() == built["digest"]

    for extra in ([], ["--oracle"]):
        assert main(["eval", str(out), "--data", str(task_folder / "golden.jsonl"), "--json", *extra]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["rows"] == len(EVENTS)
        assert figures["exact"] == 1.0
        assert set(figures["ece"]) == {"kind", "urgent", "rank"}
        assert figures["floors"]["kind"]["floor"] == 0.5
    assert main(["eval", str(out), "--data", str(task_folder / "golden.jsonl")]) == 0
    printed_figures = capsys.readouterr().out
    assert "100.00%" in printed_figures
    assert re.search(r"^kind +0\.5 .*% to .*%", printed_figures, re.MULTILINE)

    assert main([*arguments, "--sign-key", str(key_file)]) == 1
    assert "export.out_exists" in capsys.readouterr().err


def test_failure_is_one_line_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "build",
        str(tmp_path),
        "--target",
        "cpu-x86_64",
        "--task",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*arguments, "--sign-key", str(tmp_path / "absent.pem"), "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["code"] == "key.unreadable"
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["build"], ["eval", "x"], ["synth", "x"], ["frobnicate"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_unnamed_task_of_several_is_wrong_usage(
    llama: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(llama), "--target", "cpu-x86_64", "--out", str(tmp_path / "o")]
    tasks = ["--task", str(task_folder), str(task_folder)]
    assert main([*arguments, *tasks, "--evaluate-on", "data.jsonl"]) == 2
    assert "export.usage" in capsys.readouterr().err


def test_a_line_without_events_to_draw_it_through_is_wrong_usage(
    llama: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(llama), "--target", "cpu-x86_64", "--out", str(tmp_path / "o"), "--task"]
    assert main([*arguments, str(task_folder), "--isotonic"]) == 2
    assert "--calibrate-on" in capsys.readouterr().err


def test_help_shows_an_example() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "export", "build", "--help"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert "  edge-export build ./checkpoint" in run.stdout


def test_targets_list_every_board(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) == {"cpu-arm64", "cpu-x86_64", "cuda-jetson", "qnn-htp", "openvino"}
    assert all(board["buildable"] for board in listed.values())
    assert main(["targets"]) == 0
    assert "unverified" in capsys.readouterr().out


def test_target_whose_parts_are_missing_is_refused(tmp_path: Path) -> None:
    text = (TARGETS_DIR / "cpu-x86_64.toml").read_text()
    (tmp_path / "cpu-x86_64.toml").write_text(text.replace("buildable = true", "buildable = false"))
    with pytest.raises(EdgeError) as caught:
        buildable_board("cpu-x86_64", tmp_path)
    assert caught.value.code == "export.target_not_buildable"


def test_broken_target_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpu-x86_64.toml").write_text('name = "cpu-x86_64"\nverification = "certified by the vendor"\n')
    with pytest.raises(Exception, match=r"export\.target_invalid: cpu-x86_64\.toml"):
        load_boards(tmp_path)


def test_synthetic_checkpoint_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "--like", "smollm2-135m", "--layers", "1", str(tmp_path / "synthetic")]) == 0
    checkpoint = open_checkpoint(tmp_path / "synthetic")
    assert checkpoint.vocab_size == 49_152
    assert checkpoint.parameters == 49_152 * 576 + 576 * (576 * 2 + 192 * 2 + 3 * 1536) + 3 * 576
    assert f"{checkpoint.parameters:,}" in capsys.readouterr().out
    assert main(["synth", "--like", "smollm2-135m", str(tmp_path / "synthetic")]) == 1
    assert main(["synth", "--like", "gpt-5", str(tmp_path / "other")]) == 1
    assert "export.shape_unknown" in capsys.readouterr().err


def test_synthetic_weights_are_the_same_every_time(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 400, "head_dim": 16, "num_attention_heads": 2}
    for name in ("one", "two"):
        synthesise("qwen3-0.6b", tmp_path / name, layers=1, **tiny)
    assert open_checkpoint(tmp_path / "one").sha256 == open_checkpoint(tmp_path / "two").sha256


@pytest.mark.parametrize("size", [300, 5000, max(shape["vocab_size"] for shape in SHAPES.values())])
def test_synthetic_tokenizer_has_the_wanted_size_and_loses_nothing(size: int) -> None:
    tokenizer = make_tokenizer(size)
    assert tokenizer.get_vocab_size() == size
    text = 'press-4: "Öldruck" 4.2 bar <|eos|>\n\t漏'
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_build_opens_no_connection(llama: Path, task_folder: Path, tmp_path: Path) -> None:
    """Python's own sockets are watched; what native code does is watched by the runtime's strace test."""
    script = (
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): raise SystemExit(f'{event} {arguments}')\n"
        "sys.addaudithook(watch)\n"
        "from export.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["build", str(llama), "--target", "cpu-arm64", "--task", str(task_folder), "--out", str(tmp_path / "o")]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--name", "tiny"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "tiny 0.1.0" in run.stdout
