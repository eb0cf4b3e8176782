"""The updater's own thread, with the real child process that judges trust."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from edge_agent.contract.messages import Reported
from edge_agent.update.machine import Record
from edge_agent.update.updater import Updater
from tests.fakes.mqtt_peer import wait_until
from tests.fakes.release_simulator import Published
from tests.fakes.update_ports import FakePorts
from tests.update.conftest import NODE, Device, find_in_this_process, publish

# Generous, because a machine may be busy.
wait_a_minute = partial(wait_until, timeout_s=60.0)


def test_the_thread_takes_an_order_from_another_thread_and_stops_when_told(device: Device) -> None:
    release = publish(device, "1.0")
    updater = Updater(device.settings, device.state_dir, NODE, device.ports)
    updater.resume()
    stop = threading.Event()
    thread = threading.Thread(target=updater.run, args=(stop,))
    thread.start()
    try:
        updater.on_desired(device.simulator.order(release, probation_s=0.2))
        wait_a_minute(lambda: updater.reported().state == "committed")
    finally:
        stop.set()
        thread.join(timeout=10)
    assert not thread.is_alive()
    assert updater.reported().state == "committed"
    assert Record.model_validate_json((device.state_dir / "update.json").read_bytes()).phase == "committed"


def test_a_report_that_cannot_be_delivered_does_not_end_the_thread(device: Device) -> None:
    release = publish(device, "1.0")
    failures = [OSError("no uplink"), OSError("no uplink")]

    class DeafPorts(FakePorts):
        def report(self, reported: Reported) -> None:
            if reported.state == "trial" and failures:
                raise failures.pop()
            super().report(reported)

    stop = threading.Event()
    ports = DeafPorts()
    updater = Updater(
        device.settings, device.state_dir, NODE, ports, clock=device.clock, find_release=find_in_this_process
    )
    updater.resume()
    thread = threading.Thread(target=updater.run, args=(stop,))
    thread.start()
    try:
        updater.on_desired(device.simulator.order(release))
        wait_a_minute(lambda: updater.reported().state == "committed")
    finally:
        stop.set()
        thread.join(timeout=10)
    assert updater.reported().state == "committed"


@pytest.mark.needs("root", "mount", "umount")
def test_nothing_is_done_that_cannot_be_written_down(device: Device, v1: Published, tmp_path: Path) -> None:
    v2 = publish(device, "2.0")
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", full], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        shutil.copytree(device.state_dir, full / "state", symlinks=True)
        device.state_dir = full / "state"
        device.boot()
        with (full / "log").open("wb", buffering=0) as log:
            os.posix_fallocate(log.fileno(), 0, os.statvfs(full).f_bavail * 4096)
        stop = threading.Event()
        thread = threading.Thread(target=device.updater.run, args=(stop,))
        thread.start()
        try:
            device.updater.on_desired(device.simulator.order(v2, rev=2))
            wait_a_minute(lambda: device.error_code == "disk.full")
            assert (device.state, device.active_version) == ("committed", "1.0")
            (full / "log").unlink()
            wait_a_minute(lambda: device.state == "committed" and device.active_version == "2.0")
        finally:
            stop.set()
            thread.join(timeout=10)
        assert device.error_code is None
    finally:
        subprocess.run(["umount", full], check=True)
