from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent.health.doctor import check_hardware
from edge_agent.health.hardware import (
    PowerFacts,
    hardware_facts,
    hardware_telemetry,
    power_facts,
    rss_bytes,
    temperature_c,
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def raspberry_pi(root: Path, *, alarm: str = "0\n") -> Path:
    return write(
        root,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48250\n",
            "sys/class/hwmon/hwmon2/name": "rpi_volt\n",
            "sys/class/hwmon/hwmon2/in0_lcrit_alarm": alarm,
        },
    )


def jetson(root: Path) -> Path:
    return write(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "51000\n",
            "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "99000\n",
            "sys/class/thermal/thermal_zone2/type": "soc0-thermal\n",
            "sys/class/thermal/thermal_zone2/temp": "53500\n",
            "sys/class/hwmon/hwmon1/name": "ina3221\n",
            "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr1_input": "1240\n",
            "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
            "sys/class/hwmon/hwmon1/in2_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr2_input": "not a number\n",
        },
    )


def test_a_raspberry_pi_names_itself_and_its_supply(tmp_path: Path) -> None:
    root = raspberry_pi(tmp_path)
    assert hardware_facts(root)["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert temperature_c(root) == 48.25
    assert power_facts(root) == PowerFacts(is_undervolted=False, rails_mw={})


def test_undervoltage_of_a_raspberry_pi_fails_the_doctor(tmp_path: Path) -> None:
    root = raspberry_pi(tmp_path, alarm="1\n")
    assert power_facts(root).is_undervolted is True
    check = check_hardware(root)
    assert (check.ok, check.code) == (False, "hardware.undervoltage")


def test_a_jetson_reports_its_rails_and_the_hottest_cpu_zone(tmp_path: Path) -> None:
    root = jetson(tmp_path)
    assert temperature_c(root) == 53.5
    # A rail whose current cannot be read is left out, not guessed.
    assert power_facts(root) == PowerFacts(is_undervolted=None, rails_mw={"VDD_IN": 6200})


def test_a_pc_without_cpu_zones_is_read_through_hwmon(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sys/class/hwmon/hwmon0/name": "nvme\n",
            "sys/class/hwmon/hwmon0/temp1_input": "70000\n",
            "sys/class/hwmon/hwmon1/name": "k10temp\n",
            "sys/class/hwmon/hwmon1/temp1_input": "61125\n",
        },
    )
    assert temperature_c(root) == 61.125


def test_absent_sensors_are_none(tmp_path: Path) -> None:
    assert temperature_c(tmp_path) is None
    assert power_facts(tmp_path) == PowerFacts(is_undervolted=None, rails_mw={})
    facts = hardware_facts(tmp_path)
    assert (facts["board"], facts["cpu_model"], facts["os"]) == (None, None, None)
    assert check_hardware(tmp_path).ok


@pytest.mark.parametrize("reading", ["", "-273150\n", "2147483647\n", "n/a\n"])
def test_a_reading_that_cannot_be_is_none(tmp_path: Path, reading: str) -> None:
    root = write(
        tmp_path,
        {"sys/class/thermal/thermal_zone0/type": "cpu-thermal\n", "sys/class/thermal/thermal_zone0/temp": reading},
    )
    assert temperature_c(root) is None


def test_telemetry_of_this_machine_is_plausible(tmp_path: Path) -> None:
    telemetry = hardware_telemetry(tmp_path, worker_pid=os.getpid())
    assert telemetry.agent_rss_bytes is not None
    assert telemetry.agent_rss_bytes > 10_000_000
    assert telemetry.worker_rss_bytes is not None
    assert telemetry.disk_free_bytes is not None
    assert telemetry.disk_free_bytes > 0
    assert telemetry.memory_available_bytes


def test_a_worker_that_is_gone_has_no_memory() -> None:
    assert rss_bytes(2**22 + 12345) is None


def test_a_state_directory_that_is_gone_has_no_free_space(tmp_path: Path) -> None:
    assert hardware_telemetry(tmp_path / "absent").disk_free_bytes is None
