"""The suite's own honesty: what did not run is reported, and in CI it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TEST = """
import pytest

@pytest.mark.needs("a-program-that-nobody-has", "module:json")
def test_needs_it(): ...

@pytest.mark.needs("machine:pdp-11")
def test_needs_another_machine(): ...

@pytest.mark.needs("path:build/never-made")
def test_needs_a_file(): ...

@pytest.mark.needs("sh", "module:json", "path:.")
def test_has_it(): ...

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def run_suite(directory: Path, *, ci: str) -> subprocess.CompletedProcess[str]:
    (directory / "conftest.py").write_text(CONFTEST.read_text())
    (directory / "test_it.py").write_text(TEST)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n  needs(*names): what it needs\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(directory)],
        env={**os.environ, "CI": ci},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_missing_program_is_reported_as_not_run(tmp_path: Path) -> None:
    done = run_suite(tmp_path, ci="")
    assert done.returncode == 0, done.stdout
    assert "not run here: 3" in done.stdout
    assert "needs a-program-that-nobody-has: 1 test(s)" in done.stdout
    assert "needs machine:pdp-11: 1 test(s)" in done.stdout
    assert "needs path:build/never-made: 1 test(s)" in done.stdout
    assert "1 passed, 3 skipped, 1 xfailed" in done.stdout


def test_in_ci_a_test_that_did_not_run_has_failed(tmp_path: Path) -> None:
    done = run_suite(tmp_path, ci="true")
    assert done.returncode == 1, done.stdout
    assert "not run, and CI=true does not allow that: needs a-program-that-nobody-has" in done.stdout
    assert "1 passed, 1 xfailed, 3 errors" in done.stdout


@pytest.mark.needs("sh")
def test_a_need_that_is_met_does_not_hold_a_test_back() -> None:
    assert Path("/bin/sh").exists()
