"""The other side of the broker: a machine that sends events and a system that reads decisions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from deploy.broker import close_client

WAIT_S = 15.0


@dataclass(frozen=True)
class Seen:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    content_type: str | None
    user_properties: dict[str, str]
    expiry_s: int | None


class Peer:
    """Subscribed to ``filters`` once constructed; keeps every message.

    Args:
        keeps_session: the broker keeps what comes while this peer is away (MQTT 5 only).
    """

    def __init__(self, port: int, *filters: str, is_v5: bool = True, keeps_session: bool = False) -> None:
        self.seen: list[Seen] = []
        self._changed = threading.Condition()
        self._published: set[int] = set()
        self._subscribed = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"peer-{id(self)}",
            protocol=MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311,
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.on_subscribe = lambda *_: self._subscribed.set()

        def subscribe(client: Client, *_: Any) -> None:
            # retainAsPublished, so that a retained publication is seen as one also when it is live.
            options = SubscribeOptions(qos=1, retainAsPublished=True)
            client.subscribe([(name, options) for name in filters] if is_v5 else [(name, 1) for name in filters])

        if filters:
            self._client.on_connect = subscribe
        if keeps_session:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
            properties.SessionExpiryInterval = 600
            self._client.connect("127.0.0.1", port, clean_start=False, properties=properties)
        else:
            self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        if filters:
            assert self._subscribed.wait(WAIT_S), "peer could not subscribe"
        else:
            wait_until(self._client.is_connected)

    def send(
        self,
        topic: str,
        payload: bytes | str,
        *,
        qos: int = 1,
        retain: bool = False,
    ) -> int:
        return self._client.publish(topic, payload, qos, retain).mid

    def deliver(self, topic: str, payload: bytes | str, *, retain: bool = False) -> None:
        """Send, and wait until the broker has it."""
        mid = self.send(topic, payload, retain=retain)
        with self._changed:
            assert self._changed.wait_for(lambda: mid in self._published, WAIT_S), "broker did not take the message"

    def wait_for(self, wanted: Callable[[Seen], bool], count: int = 1, timeout_s: float = WAIT_S) -> list[Seen]:
        """The messages that match, once there are ``count`` of them."""
        with self._changed:
            self._changed.wait_for(lambda: sum(map(wanted, self.seen)) >= count, timeout_s)
            found = [seen for seen in self.seen if wanted(seen)]
        assert len(found) >= count, f"{len(found)} of {count} messages came; all: {[s.topic for s in self.seen][-20:]}"
        return found

    def on(self, topic: str, count: int = 1) -> list[Seen]:
        return self.wait_for(lambda seen: seen.topic == topic, count)

    def close(self) -> None:
        # Without that a garbage collection may come to a socket of this peer before it comes to the client: a
        # ResourceWarning, in whichever test runs by then.
        close_client(self._client)

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        properties = message.properties
        seen = Seen(
            topic=message.topic,
            payload=bytes(message.payload),
            qos=message.qos,
            retain=message.retain,
            content_type=getattr(properties, "ContentType", None),
            user_properties=dict(getattr(properties, "UserProperty", [])),
            expiry_s=getattr(properties, "MessageExpiryInterval", None),
        )
        with self._changed:
            self.seen.append(seen)
            self._changed.notify_all()

    def _on_publish(self, _client: Client, _userdata: Any, mid: int, *_: Any) -> None:
        with self._changed:
            self._published.add(mid)
            self._changed.notify_all()


MakePeer = Callable[..., Peer]


def wait_until(true: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Poll until ``true()``; fails loudly when that never comes."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.01)
