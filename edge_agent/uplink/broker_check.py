"""A real connection to the broker, for ``edge-agent doctor``."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import TransientError
from edge_agent.settings import MqttSettings
from edge_agent.uplink.connection import Connack, Connection, Identity
from edge_agent.uplink.session import MAYBE_OLD, client_id


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """What the broker said to a trial connection."""

    protocol: str
    receive_maximum: int
    max_packet_bytes: int | None


def check_broker(settings: MqttSettings, topics: NodeTopics) -> BrokerFacts:
    """Connect under an id of its own (the running daemon is not disturbed), subscribe, disconnect.

    Raises:
        EdgeError: the ``mqtt.*`` code that the daemon would log.
    """
    versions = {"auto": (True, False), "5": (True,), "3.1.1": (False,)}[settings.protocol]
    for is_v5 in versions:
        try:
            return _try(settings, topics, is_v5=is_v5)
        except TransientError as error:
            if is_v5 is versions[-1] or error.code not in MAYBE_OLD:
                raise
    raise TransientError("mqtt.refused", "no protocol version was accepted")


def _try(settings: MqttSettings, topics: NodeTopics, *, is_v5: bool) -> BrokerFacts:
    identity = Identity(f"{client_id(topics)}-doctor", clean=True)
    connection = Connection(settings, identity, None, is_v5=is_v5, wake=threading.Event())
    try:
        connack: Connack = connection.open()
        connection.subscribe([(topics.events_filter, False), (topics.model_desired, False)])
    finally:
        connection.close()
    return BrokerFacts("5" if is_v5 else "3.1.1", connack.receive_maximum, connack.max_packet_bytes)
