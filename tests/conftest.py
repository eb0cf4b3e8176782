"""Rules for the whole suite: what cannot run here is said aloud, and under ``CI=true`` it is a failure.

A test that needs a program, root or an optional package says so::

    @pytest.mark.needs("mosquitto")             # a program on the PATH (or in /usr/sbin)
    @pytest.mark.needs("module:torch", "root")  # an importable package; the super-user
    @pytest.mark.needs("machine:x86_64", "path:build/arm64-root")  # a kind of machine; a file below the repository

Where a need is not met the test is reported as not run, with the reason, in a closing section. ``CI=true`` turns that,
and every other skip, into a failure: a build that did not run its tests has not passed them.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import platform
import shutil
import signal
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

# A shell that starts us in the background has SIGINT ignored, and what is ignored stays ignored in every child: tests
# of Ctrl-C would wait for ever. What is handled here is at its default in a child.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before any test module imports onnxruntime: its official wheels report home by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
_SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
# Filled on the reporting side: under xdist the controller sees every worker's reports.
_not_run: list[tuple[str, str]] = []


def missing_needs(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that this machine does not have."""
    return [name for name in names if not _is_met(name)]


def _is_met(name: str) -> bool:
    if name == "root":
        return os.geteuid() == 0
    if name.startswith("module:"):
        return importlib.util.find_spec(name.removeprefix("module:")) is not None
    if name.startswith("machine:"):
        return platform.machine() == name.removeprefix("machine:")
    if name.startswith("path:"):
        return (REPOSITORY / name.removeprefix("path:")).exists()
    return shutil.which(name, path=_SYSTEM_PATH) is not None


def _must_run() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = missing_needs(name for marker in item.iter_markers("needs") for name in marker.args)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # An expected failure is also "skipped" to pytest; it did run.
    if report.skipped and not hasattr(report, "wasxfail"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if _must_run():
        reason = _reason(report)
        report.outcome = "failed"
        report.longrepr = f"not run, and CI=true does not allow that: {reason}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _not_run.append((report.nodeid, _reason(report)))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _not_run.append((report.nodeid, _reason(report)))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    found: Any = report.longrepr
    return str(found[2] if isinstance(found, tuple) else found).removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _not_run:
        return
    terminalreporter.section(f"not run here: {len(_not_run)}")
    for reason in sorted({reason for _, reason in _not_run}):
        files = collections.Counter(nodeid.partition("::")[0] for nodeid, why in _not_run if why == reason)
        terminalreporter.write_line(f"{reason}: {files.total()} test(s)")
        for name, count in sorted(files.items()):
            terminalreporter.write_line(f"    {name}: {count}")
    terminalreporter.write_line("Install what is named above, or run with CI=true to have these count as failures.")
