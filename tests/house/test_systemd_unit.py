"""The unit passes `systemd-analyze`, and the check itself notices what it is there to notice."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd/edge-agent.service"


def check_units(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / ".ci/check_units.sh"],
        env={**os.environ, "CI": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the check reads, to plant faults in."""
    for name in (".ci", "systemd"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.needs("systemd-analyze")
def test_the_unit_verifies_and_is_hardened_with_and_without_each_board() -> None:
    done = check_units(ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + len(list((ROOT / "systemd/boards").glob("*.conf")))
    assert "exposure" in done.stdout


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("NoNewPrivileges=yes", "NoNewPriviledges=yes"),
        ("WatchdogSec=90s", "WatchdogSec=soon"),
        ("/opt/edge-agent/current/bin/edge-agent run", "/opt/edge-agent/current/bin/edge-agnet run"),
    ],
)
def test_a_fault_in_the_unit_fails_the_check(tree: Path, line: str, fault: str) -> None:
    unit = tree / "systemd/edge-agent.service"
    unit.write_text(UNIT.read_text().replace(line, fault))
    assert check_units(tree).returncode == 1


@pytest.mark.needs("systemd-analyze")
def test_a_unit_that_lost_its_hardening_fails_the_check(tree: Path) -> None:
    unit = tree / "systemd/edge-agent.service"
    kept, _, rest = UNIT.read_text().partition("# --- what the service may not do")
    unit.write_text(kept + "[Install]" + rest.partition("[Install]")[2])
    done = check_units(tree)
    assert done.returncode == 1
    assert "exceeds 2.0" in done.stderr


@pytest.mark.needs("systemd-analyze")
def test_a_board_file_is_checked_too(tree: Path) -> None:
    (tree / "systemd/boards/new-board.conf").write_text("[Service]\nMemoryMaximum=1G\n")
    assert check_units(tree).returncode == 1


def test_the_promises_of_the_unit() -> None:
    unit = configparser.RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["OOMPolicy"] == "continue"
    assert "ORT_DISABLE_TELEMETRY=1" in UNIT.read_text()
    assert int(unit["Unit"]["StartLimitBurst"]) > 0
    assert unit["Unit"]["StartLimitIntervalSec"] not in {"0", "infinity"}
    assert "network-online.target" not in unit["Unit"].get("After", "")


def test_systemd_and_ansible_are_no_packages() -> None:
    for folder in ("systemd", "ansible"):
        assert not list((ROOT / folder).rglob("__init__.py"))
