"""A device with its registry, for tests of the whole update path."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.settings import UpdateSettings
from edge_agent.update.transport import open_transport
from edge_agent.update.trust import TrustedRelease, find_release
from edge_agent.update.trust_process import Request
from edge_agent.update.updater import Updater
from tests.fakes.release_simulator import TARGET, Published, ReleaseSimulator
from tests.fakes.static_server import StaticServer
from tests.fakes.update_ports import FakeClock, FakePorts

NODE = "press-4"


def find_in_this_process(request: Request, checkpoint: Callable[[], None]) -> TrustedRelease:
    """As the child process does it, without the half second that starting one costs."""
    checkpoint()
    transport = open_transport(request.registry_url)
    return find_release(
        request.release, transport, trust_dir=request.trust_dir, state_dir=request.state_dir, wall=request.wall
    )


class Device:
    """One gateway: a state directory, and an updater that can be thrown away and started again."""

    def __init__(self, directory: Path, simulator: ReleaseSimulator, registry_url: str) -> None:
        self.state_dir = directory / "state"
        self.trust_dir = simulator.install_trust(directory / "trust")
        self.simulator = simulator
        self.clock = FakeClock(simulator.now)
        self.ports = FakePorts()
        self.settings = UpdateSettings(
            registry_url=registry_url, trust_dir=self.trust_dir, target=TARGET, reserve_disk_bytes=0
        )
        self.updater = self.boot()

    def boot(self, **settings: Any) -> Updater:
        """Start (again), as after a power cut: what is in memory is gone, what serves is the active bundle."""
        self.settings = self.settings.model_copy(update=settings)
        self.updater = Updater(
            self.settings, self.state_dir, NODE, self.ports, clock=self.clock, find_release=find_in_this_process
        )
        self.updater.resume()
        active = self.updater.slots.active()
        self.ports.serving = None if active is None else active.digest
        return self.updater

    def settle(self, limit: int = 5000) -> None:
        """Let the updater work until nothing is left to do."""
        for _ in range(limit):
            if not self.updater.advance():
                return
        raise AssertionError(f"still busy: {self.updater.reported()}")

    def order(self, envelope: bytes) -> None:
        self.updater.on_desired(envelope)
        self.settle()

    @property
    def state(self) -> str:
        return self.updater.reported().state

    @property
    def error_code(self) -> str | None:
        error = self.updater.reported().error
        return None if error is None else error.code

    @property
    def active_version(self) -> str | None:
        active = self.updater.slots.active()
        return None if active is None else active.manifest.version


def publish(device: Device, version: str, model: bytes | None = None) -> Published:
    return device.simulator.publish("triage", version, {"model/decoder.onnx": model or version.encode() * 5000})


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Memory where there is some: these tests fsync thousands of times, and none of them can lose power for real."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("update")
        return
    with tempfile.TemporaryDirectory(prefix="edge-agent-test-", dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def simulator(tmp_path: Path) -> ReleaseSimulator:
    return ReleaseSimulator(tmp_path / "registry")


@pytest.fixture
def server(simulator: ReleaseSimulator) -> Iterator[StaticServer]:
    with StaticServer(simulator.directory) as running:
        yield running


@pytest.fixture
def device(tmp_path: Path, simulator: ReleaseSimulator, server: StaticServer) -> Device:
    return Device(tmp_path, simulator, server.url)


@pytest.fixture
def v1(device: Device) -> Published:
    """Version 1.0 committed under revision 1; reports and swaps so far are forgotten."""
    release = publish(device, "1.0")
    device.order(device.simulator.order(release, rev=1))
    assert device.active_version == "1.0"
    device.ports.reports.clear()
    device.ports.swaps.clear()
    return release
