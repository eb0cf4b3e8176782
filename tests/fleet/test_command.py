from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from deploy.__main__ import COMMANDS, main
from deploy.broker import BrokerAddress
from deploy.keys import Keys
from tests.fleet.conftest import MakeBundle

REPOSITORY = Path(__file__).parents[2]


def edge_deploy(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=REPOSITORY,
        check=False,
    )


@pytest.mark.needs("mosquitto")
def test_a_release_goes_from_keys_to_desired_state(
    tmp_path: Path, make_bundle: MakeBundle, mosquitto: BrokerAddress, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, registry = tmp_path / "ceremony", tmp_path / "reg"
    bundle = make_bundle(sign=False)

    def run(*arguments: str | Path) -> str:
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    run("keys", "init", keys)
    run("registry", "init", registry, "--keys", keys)
    published = json.loads(
        run("release", "publish", bundle, "--registry", registry, "--keys", keys, "--sign", "--json")
    )
    assert published["release"] in run("release", "list", "--registry", registry, "--keys", keys)
    broker = ["--broker", f"{mosquitto.host}:{mosquitto.port}"]
    wanted: list[str | Path] = [
        "--site",
        "plant1",
        "--node",
        "gw",
        "--release",
        "triage/1.0.0/cpu-x86_64",
        "--registry",
        registry,
    ]
    for rev in (1, 2):
        state = json.loads(run("desired", "set", *wanted, "--keys", keys, *broker, "--json"))
        assert (state["rev"], state["digest"], state["node"]) == (rev, published["digest"], "gw")
    assert run("fleet", "status", *broker) == ""
    assert "timestamp" in run("registry", "refresh", registry, "--keys", keys)


def test_registry_is_served_until_terminated(registry: object, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "deploy", "registry", "serve", str(tmp_path / "registry"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    try:
        assert child.stdout
        url = json.loads(child.stdout.readline())["url"]
        with urllib.request.urlopen(f"{url}/metadata/timestamp.json", timeout=5) as answer:  # noqa: S310 - our own server
            assert json.load(answer)["signed"]["_type"] == "timestamp"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == 130
    finally:
        child.kill()
        child.communicate()


def test_failure_is_one_line_with_its_code(tmp_path: Path, keys: Keys) -> None:
    done = edge_deploy("release", "list", "--registry", tmp_path / "nowhere", "--keys", keys.directory)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("edge-deploy: registry.missing: ")
    assert "Traceback" not in done.stderr


def test_wrong_usage_exits_two() -> None:
    assert edge_deploy("release", "publish").returncode == 2
    assert edge_deploy("demo", "--seconds", "0").returncode == 2
    assert edge_deploy().returncode == 2


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "example: edge-deploy" in capsys.readouterr().out


def test_help_of_the_whole_imports_no_model_library() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "tuf")
    code = f"import sys, deploy.__main__ as m; m.parser(); print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
