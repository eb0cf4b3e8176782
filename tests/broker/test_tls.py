"""TLS against a real broker that wants a client certificate."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.settings import MqttSettings
from edge_agent.uplink.broker_check import check_broker
from tests.fakes.brokers import BrokerProcess, mosquitto
from tests.fakes.certificates import Authority
from tests.fakes.mqtt_peer import wait_until
from tests.fakes.node import TOPICS, Node

pytestmark = [
    pytest.mark.needs("mosquitto"),
    # paho leaves the socket of a failed handshake to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def strict(tmp_path: Path, authority: Authority) -> Iterator[BrokerProcess]:
    server = authority.issue("server")
    started = mosquitto(
        tmp_path,
        f"cafile {authority.ca_file}",
        f"certfile {server.cert_file}",
        f"keyfile {server.key_file}",
        "require_certificate true",
    )
    started.start()
    yield started
    started.stop()
    gc.collect()


def settings_for(port: int, authority: Authority, **more: object) -> MqttSettings:
    return MqttSettings.model_validate(
        {"host": "127.0.0.1", "port": port, "tls": True, "ca_file": authority.ca_file, "connect_timeout_s": 3, **more}
    )


def test_a_node_with_a_certificate_of_the_plant_is_let_in(
    strict: BrokerProcess, authority: Authority, node: Callable[..., Node]
) -> None:
    client = authority.issue("press-4")
    files = {"ca_file": authority.ca_file, "cert_file": client.cert_file, "key_file": client.key_file}
    device = node(strict.port, tls=True, **files)
    device.start()
    wait_until(lambda: device.uplink.connected)
    device.uplink.publish_retained(TOPICS.model_reported, json.dumps({"state": "idle"}).encode())
    wait_until(lambda: check_broker(device.settings, TOPICS).protocol == "5")


def test_a_server_of_an_unknown_authority_is_not_trusted(strict: BrokerProcess, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "another root")
    with pytest.raises(TransientError) as caught:
        check_broker(settings_for(strict.port, stranger), TOPICS)
    assert caught.value.code == "mqtt.tls_failed"
    assert "verify failed" in caught.value.detail


def test_a_server_under_another_name_is_not_trusted(strict: BrokerProcess, authority: Authority) -> None:
    with pytest.raises(TransientError) as caught:
        check_broker(settings_for(strict.port, authority, host="localhost"), TOPICS)
    assert caught.value.code == "mqtt.tls_failed"


def test_a_node_without_a_certificate_is_not_let_in(strict: BrokerProcess, authority: Authority) -> None:
    with pytest.raises(TransientError) as caught:
        check_broker(settings_for(strict.port, authority), TOPICS)
    # With TLS 1.3 the server says so after the handshake: as a TLS alert, or by hanging up.
    assert caught.value.code in {"mqtt.tls_failed", "mqtt.closed_early"}
