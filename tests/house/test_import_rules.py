"""Each import rule is proven to bite: a violating module is planted in a copy, and the build must fail for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PACKAGES = ("edge_agent", "export", "deploy")

# (rule, file, line that breaks it)
VIOLATIONS = [
    ("layers", "edge_agent/errors.py", "import edge_agent.fs"),
    ("layers", "edge_agent/fs.py", "import edge_agent.contract.event"),
    ("layers", "edge_agent/contract/event.py", "import edge_agent.settings"),
    ("layers", "edge_agent/settings.py", "import edge_agent.uplink"),
    ("layers", "edge_agent/uplink/planted.py", "import edge_agent.update"),
    ("layers", "edge_agent/update/planted.py", "import edge_agent.runtime"),
    ("layers", "edge_agent/health/planted.py", "import edge_agent.uplink"),
    ("layers", "edge_agent/runtime/planted.py", "import edge_agent.health"),
    ("layers", "edge_agent/escalation/planted.py", "import edge_agent.uplink"),
    ("layers", "edge_agent/uplink/planted.py", "import edge_agent.escalation"),
    ("layers", "edge_agent/runtime/planted.py", "import edge_agent.__main__"),
    ("layers", "edge_agent/a_room_without_a_floor.py", ""),
    ("device-is-light", "edge_agent/runtime/planted.py", "import torch"),
    ("device-is-light", "edge_agent/contract/planted.py", "from transformers import AutoModel"),
    ("device-is-light", "edge_agent/runtime/planted.py", "import optimum.exporters.onnx"),
    ("device-is-light", "edge_agent/runtime/planted.py", "import onnx"),
    ("device-is-light", "edge_agent/health/planted.py", "import export"),
    ("device-is-light", "edge_agent/health/planted.py", "import deploy"),
    ("deploy-imports", "deploy/planted.py", "import export"),
    ("deploy-imports", "deploy/planted.py", "import edge_agent.settings"),
    ("deploy-imports", "deploy/planted.py", "import edge_agent.uplink.spool"),
    ("deploy-imports", "deploy/planted.py", "import edge_agent.runtime"),
    ("export-imports", "export/planted.py", "import deploy"),
    ("export-imports", "export/planted.py", "import edge_agent.settings"),
    ("export-imports", "export/planted.py", "import edge_agent.update"),
    ("deploy-is-light", "deploy/planted.py", "import torch"),
    ("deploy-is-light", "deploy/planted.py", "import onnxruntime"),
    ("one-mqtt-client", "edge_agent/update/planted.py", "import paho.mqtt.client"),
    ("one-mqtt-client", "edge_agent/runtime/planted.py", "from paho.mqtt import client"),
    ("one-mqtt-client", "export/planted.py", "import paho.mqtt.client"),
    ("one-engine", "edge_agent/uplink/planted.py", "import onnxruntime"),
    ("one-engine", "edge_agent/health/planted.py", "import numpy"),
    ("one-engine", "edge_agent/settings.py", "import llguidance"),
    ("agent-without-engine", "edge_agent/update/planted.py", "import numpy"),
    ("agent-without-engine", "edge_agent/runtime/worker_process.py", "import edge_agent.runtime.engine"),
    ("pure-machine", "edge_agent/update/machine.py", "import time"),
    ("pure-machine", "edge_agent/update/machine.py", "from edge_agent.fs import write_atomic"),
    ("pure-escalation", "edge_agent/escalation/rules.py", "import time"),
    ("pure-escalation", "edge_agent/escalation/answers.py", "import threading"),
    ("one-trust-client", "edge_agent/uplink/planted.py", "import tuf.api.metadata"),
]


def contracts() -> dict[str, str]:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {rule["id"]: rule["name"] for rule in rules}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three packages' sources and the rules, somewhere else."""
    target = tmp_path_factory.mktemp("planted")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("*.onnx", "*.data", "bundle"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def lint(tree: Path, rule: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "lint-imports", "--no-cache", *(["--contract", rule] if rule else [])],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.needs("module:importlinter")
def test_the_copy_is_clean_before_anything_is_planted(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.needs("module:importlinter")
@pytest.mark.parametrize(("rule", "where", "line"), VIOLATIONS, ids=[f"{v[0]}:{v[1]}:{v[2]}" for v in VIOLATIONS])
def test_a_violation_breaks_the_build(copy: Path, rule: str, where: str, line: str) -> None:
    target = copy / where
    before = target.read_text() if target.exists() else None
    try:
        target.write_text(f"{before or ''}\n{line}\n")
        done = lint(copy, rule)
        assert done.returncode == 1, done.stdout
        assert "BROKEN" in done.stdout or "not in the layers" in done.stdout.replace("\n", " "), done.stdout
    finally:
        if before is None:
            target.unlink()
        else:
            target.write_text(before)


def test_every_rule_has_a_violation_that_proves_it() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == set(contracts())
