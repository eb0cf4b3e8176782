"""Real brokers for the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.settings import MqttSettings, SpoolSettings
from tests.fakes.brokers import BrokerProcess, amqtt, mosquitto, running
from tests.fakes.cut_proxy import CutProxy
from tests.fakes.mqtt_peer import Peer
from tests.fakes.node import Node


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    yield from running(mosquitto(tmp_path))


@pytest.fixture
def old_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    yield from running(amqtt(tmp_path))


@pytest.fixture
def proxy() -> Iterator[Callable[[int], CutProxy]]:
    made: list[CutProxy] = []

    def make(target_port: int) -> CutProxy:
        made.append(CutProxy(target_port))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(port: int, *filters: str, is_v5: bool = True, keeps_session: bool = False) -> Peer:
        made.append(Peer(port, *filters, is_v5=is_v5, keeps_session=keeps_session))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(port: int, *, spool: SpoolSettings | None = None, keepalive_s: int = 30, **mqtt: object) -> Node:
        settings = MqttSettings.model_validate(
            {"host": "127.0.0.1", "port": port, "connect_timeout_s": 2.0, "reconnect_max_s": 0.5, **mqtt}
        )
        # A copy is not validated: tests cannot wait for the shortest keepalive that a device may have.
        made.append(Node(tmp_path, settings.model_copy(update={"keepalive_s": keepalive_s}), spool))
        return made[-1]

    yield make
    for one in made:
        one.stop()
