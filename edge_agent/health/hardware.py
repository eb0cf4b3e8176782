"""What the machine is and how it fares. A sensor that is absent is None, never a guess.

Source: Linux ``Documentation/ABI/testing/sysfs-class-hwmon`` and ``sysfs-class-thermal``,
``Documentation/hwmon/raspberrypi-hwmon.rst`` and ``ina3221.rst``.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge_agent.contract.messages import HardwareTelemetry, now_ms

ROOT = Path("/")
# CPU zones by the names that kernels use on the boards we target; the hottest of them is reported.
_CPU_ZONES = ("cpu", "soc", "x86_pkg_temp", "tj", "coretemp", "k10temp", "acpitz")
_PLAUSIBLE_C = (-60.0, 200.0)


@dataclass(frozen=True, slots=True)
class PowerFacts:
    """Power as the board reports it.

    Args:
        is_undervolted: Raspberry Pi: the supply is (or was, since the last read) below 4.63 V; None where unknown.
        rails_mw: Jetson: power in milliwatts by rail name; empty where there is no INA3221.
    """

    is_undervolted: bool | None
    rails_mw: dict[str, int]


def hardware_facts(root: Path = ROOT) -> dict[str, Any]:
    """What does not change while the daemon runs, for ``meta``.

    Args:
        root: where ``sys`` and ``proc`` are mounted; another directory in tests.
    """
    return {
        "architecture": platform.machine(),
        "board": _board(root),
        "cpu_model": _cpu_model(root),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": psutil.cpu_count(logical=True),
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "os": _os_name(root),
        "python": platform.python_version(),
    }


def hardware_telemetry(state_dir: Path, *, worker_pid: int | None = None, root: Path = ROOT) -> HardwareTelemetry:
    """What changes, for ``tele/hw``.

    Args:
        state_dir: whose file system's free space is reported.
        worker_pid: the inference worker, if it runs.
        root: where ``sys`` is mounted.
    """
    return HardwareTelemetry(
        # Share since the last call; the first call after the start has nothing to compare with and says 0.
        cpu_percent=psutil.cpu_percent(interval=None),
        memory_available_bytes=psutil.virtual_memory().available,
        disk_free_bytes=_disk_free(state_dir),
        temperature_c=temperature_c(root),
        agent_rss_bytes=rss_bytes(os.getpid()),
        worker_rss_bytes=None if worker_pid is None else rss_bytes(worker_pid),
        timestamp_ms=now_ms(),
    )


def temperature_c(root: Path = ROOT) -> float | None:
    """The hottest CPU or SoC zone in degrees Celsius."""
    readings: list[float] = []
    for zone in _listed(root / "sys/class/thermal", "thermal_zone*"):
        name = (_text(zone / "type") or "").lower()
        if any(part in name for part in _CPU_ZONES):
            readings += _celsius(zone / "temp")
    if not readings:
        for hwmon in _listed(root / "sys/class/hwmon", "hwmon*"):
            if any(part in (_text(hwmon / "name") or "").lower() for part in _CPU_ZONES):
                for sensor in _listed(hwmon, "temp*_input"):
                    readings += _celsius(sensor)
    return max(readings, default=None)


def power_facts(root: Path = ROOT) -> PowerFacts:
    """Undervoltage (Raspberry Pi) and rails (Jetson)."""
    undervolted: bool | None = None
    rails_mw: dict[str, int] = {}
    for hwmon in _listed(root / "sys/class/hwmon", "hwmon*"):
        name = _text(hwmon / "name")
        if name == "rpi_volt":
            alarm = _number(hwmon / "in0_lcrit_alarm")
            undervolted = None if alarm is None else alarm != 0
        elif name == "ina3221":
            rails_mw |= _rails_mw(hwmon)
    return PowerFacts(undervolted, rails_mw)


def rss_bytes(pid: int) -> int | None:
    """Resident memory of a process, None when it is gone or not ours to see."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _rails_mw(hwmon: Path) -> dict[str, int]:
    rails: dict[str, int] = {}
    for channel in (1, 2, 3):
        label = _text(hwmon / f"in{channel}_label")
        millivolts, milliamperes = _number(hwmon / f"in{channel}_input"), _number(hwmon / f"curr{channel}_input")
        if label and millivolts is not None and milliamperes is not None:
            rails[label] = round(millivolts * milliamperes / 1000)
    return rails


def _celsius(path: Path) -> list[float]:
    millidegrees = _number(path)
    if millidegrees is None or not _PLAUSIBLE_C[0] <= millidegrees / 1000 <= _PLAUSIBLE_C[1]:
        return []
    return [millidegrees / 1000]


def _board(root: Path) -> str | None:
    model = _text(root / "proc/device-tree/model") or _text(root / "sys/class/dmi/id/product_name")
    return model.strip("\0 ") or None if model else None


def _cpu_model(root: Path) -> str | None:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip() or None
    return None


def _os_name(root: Path) -> str | None:
    for line in (_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"') or None
    return None


def _disk_free(path: Path) -> int | None:
    try:
        return psutil.disk_usage(str(path)).free
    except OSError:
        return None


def _listed(directory: Path, pattern: str) -> list[Path]:
    try:
        return sorted(directory.glob(pattern))
    except OSError:
        return []


def _text(path: Path) -> str | None:
    # sysfs files of a sleeping or broken sensor fail on read with EAGAIN, EIO, EINVAL or ENODATA.
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
