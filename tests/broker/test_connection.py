"""Connections that cannot be had, or that end, against a real mosquitto and sockets."""

from __future__ import annotations

import functools
import gc
import threading
from pathlib import Path

import pytest

from edge_agent.errors import TransientError
from edge_agent.settings import MqttSettings
from edge_agent.uplink.broker_check import check_broker
from tests.fakes.brokers import BrokerProcess, free_port, mosquitto
from tests.fakes.cut_proxy import MakeProxy
from tests.fakes.mqtt_peer import MakePeer, wait_until
from tests.fakes.node import TOPICS, MakeNode, states

pytestmark = pytest.mark.needs("mosquitto")


def test_a_silent_network_is_noticed_by_the_keepalive(
    broker: BrokerProcess, node: MakeNode, peer: MakePeer, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port, keepalive_s=1)
    device.start()
    reader = peer(broker.port, TOPICS.status)
    reader.on(TOPICS.status)
    network.swallow("up")
    network.swallow("down")
    # The broker misses us after 1.5 keepalives and publishes the will; we miss the broker's answer as well.
    wait_until(lambda: "offline" in states(reader))
    network.heal()
    wait_until(lambda: states(reader)[-1] == "online")


def test_refused_credentials_have_their_own_code_and_are_logged_once(
    node: MakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = mosquitto(tmp_path, anonymous=False)
    strict.start()
    try:
        device = node(strict.port, username="edge", password="wrong", reconnect_max_s=0.05)
        device.start()
        wait_until(lambda: device.uplink.fault == "mqtt.auth_refused")
        wait_until(lambda: device.wills > 5)
        printed = capsys.readouterr()
        assert (printed.out + printed.err).count("mqtt.auth_refused") <= 2  # the code and the error of one record
        with pytest.raises(TransientError) as caught:
            check_broker(device.settings, TOPICS)
        assert caught.value.code == "mqtt.auth_refused"
    finally:
        strict.stop()


def test_a_closed_port_a_bad_host_and_a_missing_password_file_have_codes_of_their_own(tmp_path: Path) -> None:
    def code_of(**settings: object) -> str:
        with pytest.raises(TransientError) as caught:
            check_broker(MqttSettings.model_validate({"host": "127.0.0.1", "connect_timeout_s": 1, **settings}), TOPICS)
        return caught.value.code

    assert code_of(port=free_port()) == "mqtt.port_closed"
    assert code_of(host="no-such-host.invalid") == "mqtt.bad_host"
    assert code_of(username="x", password_file=str(tmp_path / "absent")) == "mqtt.password_file"
    assert code_of(tls=True, ca_file=str(tmp_path / "absent.pem")) == "mqtt.tls_files"


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_against_a_plain_port_is_a_tls_fault(broker: BrokerProcess) -> None:
    settings = MqttSettings(host="127.0.0.1", port=broker.port, tls=True, connect_timeout_s=1)
    with pytest.raises(TransientError) as caught:
        check_broker(settings, TOPICS)
    assert caught.value.code == "mqtt.tls_failed"
    del caught
    gc.collect()


def test_a_server_that_accepts_and_says_nothing_is_given_up(proxy: MakeProxy, broker: BrokerProcess) -> None:
    network = proxy(broker.port)
    network.swallow("up")
    with pytest.raises(TransientError) as caught:
        check_broker(MqttSettings(host="127.0.0.1", port=network.port, connect_timeout_s=0.5), TOPICS)
    assert caught.value.code == "mqtt.no_connack"


def test_the_doctor_does_not_disturb_the_running_session(broker: BrokerProcess, node: MakeNode, peer: MakePeer) -> None:
    device = node(broker.port)
    device.start()
    reader = peer(broker.port, TOPICS.status)
    reader.on(TOPICS.status)
    facts = check_broker(device.settings, TOPICS)
    assert facts.protocol == "5"
    assert facts.receive_maximum >= 1
    assert device.uplink.connected
    assert states(reader) == ["online"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_broker_that_hangs_up_before_it_answers_costs_no_descriptors(
    broker: BrokerProcess, node: MakeNode, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    network.refuse()
    device = node(network.port, protocol="5", reconnect_max_s=0.02)
    device.start()
    wait_until(lambda: device.wills >= 3)
    gc.collect()
    gc.disable()
    try:
        before = descriptors()
        wait_until(lambda: device.wills >= 23)
        assert descriptors() <= before + 6  # of the attempt under way, on both sides of the proxy
    finally:
        gc.enable()
    assert device.uplink.fault == "mqtt.closed_early"


def test_reconnecting_leaks_neither_threads_nor_descriptors(
    broker: BrokerProcess, node: MakeNode, proxy: MakeProxy
) -> None:
    network = proxy(broker.port)
    device = node(network.port, reconnect_max_s=0.02)
    device.start()
    wait_until(lambda: device.uplink.connected)

    def has_connected(wills: int) -> bool:
        return device.wills >= wills and device.uplink.connected

    def reconnect(times: int) -> None:
        for _ in range(times):
            wanted = device.wills + 1
            network.cut()
            wait_until(functools.partial(has_connected, wanted))

    reconnect(3)
    gc.collect()
    gc.disable()
    try:
        before, threads = descriptors(), threading.active_count()
        reconnect(10)
        # The proxy's own sockets come and go a moment later; the broker's are in another process.
        wait_until(lambda: descriptors() <= before + 2)
        wait_until(lambda: threading.active_count() <= threads + 1)
    finally:
        gc.enable()
