"""The whole path on this machine, once with each broker: keys, registry, broker, node, outage, four releases."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OUTCOMES = [("v1", "committed"), ("v2", "committed"), ("v3", "failed"), ("v4", "rolled_back")]


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy", "demo", "--plain", *arguments]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "broker",
    [
        pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto")),
        pytest.param("amqtt", marks=pytest.mark.needs("module:amqtt")),
    ],
)
def test_demo_keeps_every_promise(broker: str, reference_bundle: Path, tmp_path: Path) -> None:
    found_at = tmp_path / "out.json"
    done = subprocess.run(
        demo("--seconds", "15", "--broker", broker, "--bundle", str(reference_bundle), "--json", str(found_at)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found = json.loads(found_at.read_text())
    assert found["broker"].startswith(broker)
    assert found["events_in"] == found["decisions_out"] > 100
    assert (found["lost"], found["duplicates"], found["dead_letters"], found["faults"]) == (0, 0, 0, [])
    assert found["decisions_during_outage"] == found["delivered_after_outage"] > 0
    assert [(update["release"], update["state"]) for update in found["updates"]] == OUTCOMES
    assert found["updates"][2]["decided_in"] == "trial"
    # Same weights, another task: kilobytes move.
    assert found["updates"][1]["new_bytes"] < 100_000
    assert found["p50_ms"] <= found["p95_ms"]
    assert "Every promise was kept." in done.stdout
    assert not Path(done.stdout.split("working directory ")[1].split(",")[0]).exists()


@pytest.mark.slow
@pytest.mark.needs("mosquitto")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_no_process_and_no_directory(signum: signal.Signals, reference_bundle: Path) -> None:
    child = subprocess.Popen(
        demo("--seconds", "60", "--bundle", str(reference_bundle)), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout
        directory = ""
        for line in child.stdout:
            if line.startswith("working directory "):
                directory = line.split("working directory ")[1].split(",")[0]
            if "v1:committed" in line:
                break
        assert Path(directory).is_dir()
        assert processes_of(directory), "node and broker should be running"
        child.send_signal(signum)
        assert child.wait(timeout=60) == 130
    finally:
        child.kill()
        child.communicate()
    deadline_s = time.monotonic() + 10
    while left := processes_of(directory):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)
    assert not Path(directory).exists()


def test_demo_without_a_bundle_says_what_to_do(tmp_path: Path) -> None:
    found_at = tmp_path / "out.json"
    done = subprocess.run(
        demo("--bundle", str(tmp_path / "nowhere"), "--json", str(found_at)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(found_at.read_text())["error"]["code"] == "bundle.missing"
    assert "bundle.missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(done.stdout.split("working directory ")[1].split(",")[0]).exists()


def processes_of(directory: str) -> list[str]:
    """Command lines that name the demo's directory: broker, node and worker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if directory in line:
                found.append(line)
    return found
