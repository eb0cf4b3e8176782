"""What MQTT 5 packets of ours carry beside their content."""

from __future__ import annotations

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.settings import MqttSettings
from edge_agent.uplink.cloudevents import WireMessage


def connect_properties(settings: MqttSettings, *, is_clean: bool) -> Properties:
    """Of a CONNECT: how long the broker keeps the session, and what it may send us.

    Args:
        settings: the limits.
        is_clean: whether the session ends with the connection.
    """
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
    if not is_clean:
        properties.SessionExpiryInterval = settings.session_expiry_s
    properties.ReceiveMaximum = settings.max_inflight
    properties.MaximumPacketSize = settings.max_packet_bytes
    return properties


def publish_properties(wire: WireMessage, expiry_s: int | None) -> Properties:
    """Of a PUBLISH: content type, CloudEvents attributes, and when the broker may drop it."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
    if wire.content_type is not None:
        properties.ContentType = wire.content_type
    if wire.user_properties:
        properties.UserProperty = list(wire.user_properties)
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return properties
