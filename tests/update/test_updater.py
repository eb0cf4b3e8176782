from __future__ import annotations

from tests.fakes.static_server import StaticServer
from tests.update.conftest import Device


def test_an_update_is_downloaded_tried_proved_and_committed(device: Device, server: StaticServer) -> None:
    release = device.simulator.publish("triage", "1.0.0", {"model/decoder.onnx": b"x" * 100_000})
    device.order(device.simulator.order(release))
    assert device.ports.states == [
        "downloading",
        "verifying",
        "installing",
        "trial",
        "probation",
        "committed",
    ]
    assert device.active_version == "1.0.0"
    assert device.ports.serving == release.digest
