"""One network connection to the broker, from CONNECT to its loss.

A connection is never revived: every reconnect makes a new one, with a new paho client. So nothing of paho's own retry
state can leak from one to the next (queued publishes, packet ids, a stale will), and an acknowledgement of a message
that an earlier connection brought has nowhere to go. The session itself lives in the broker, under the stable client
id; what must survive on our side lives in the spool.

paho's callbacks run on its network thread. They only put facts into queues and set events; whatever they raise is
caught, because an exception there would end that thread.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.errors import EdgeError, TransientError
from edge_agent.log import get_logger
from edge_agent.settings import MqttSettings
from edge_agent.uplink import credentials, faults
from edge_agent.uplink.cloudevents import WireMessage
from edge_agent.uplink.packet_properties import connect_properties, publish_properties

MAX_RECEIVE_MAXIMUM = 65_535
# QoS 0 has no flow control: with this many unread messages further ones are dropped and counted. QoS 1 needs no bound
# of ours: the broker stops at our Receive Maximum (on 3.1.1 at its own window).
MAX_UNREAD = 10_000
_P = ParamSpec("_P")
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who connects.

    Args:
        clean: True forgets the session at once (a check); False keeps it for ``session_expiry_s``.
    """

    client_id: str
    clean: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained at QoS 1, when this node vanishes."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Connack:
    """What the broker granted."""

    session_present: bool
    is_v5: bool
    receive_maximum: int
    max_packet_bytes: int | None


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message from the broker; ``topic`` is None where its bytes are not UTF-8."""

    topic: str | None
    payload: bytes
    qos: int
    retain: bool
    mid: int


@dataclass(frozen=True, slots=True)
class Puback:
    """The broker's answer to a publish."""

    mid: int
    reason: int


def _caught(
    callback: Callable[Concatenate[Connection, Client, Any, _P], None],
) -> Callable[Concatenate[Connection, Client, Any, _P], None]:
    @functools.wraps(callback)
    def wrapper(self: Connection, client: Client, userdata: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            callback(self, client, userdata, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the network thread
            _log.exception("callback_failed", callback=callback.__name__)
            self._lose(TransientError("mqtt.callback_failed", f"{callback.__name__}: {error}"))

    return wrapper


class Connection:
    """A connected (or lost) MQTT client.

    Args:
        settings: broker, credentials, limits.
        identity: client id and session.
        will: the death certificate, or None for a check.
        is_v5: which protocol to speak.
        wake: set whenever something happened (a message, a PUBACK, the loss).
    """

    def __init__(
        self, settings: MqttSettings, identity: Identity, will: Will | None, *, is_v5: bool, wake: threading.Event
    ) -> None:
        self.incoming: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self._pubacks: queue.SimpleQueue[Puback] = queue.SimpleQueue()
        self.overflowed = 0
        self._settings = settings
        self._identity = identity
        self._is_v5 = is_v5
        self._wake = wake
        self._answered = threading.Event()
        self._subscribed: queue.SimpleQueue[tuple[int, list[int]]] = queue.SimpleQueue()
        self._connack: Connack | None = None
        self._fault: EdgeError | None = None
        self._lost = threading.Event()
        self._network_thread: threading.Thread | None = None
        self._client: Client | None = self._make_client(will)

    # ---- life

    def open(self, answer_within_s: float | None = None) -> Connack:
        """Connect and wait for the CONNACK.

        Args:
            answer_within_s: bound of the wait for the CONNACK; default: ``connect_timeout_s``.

        Raises:
            EdgeError: one of the ``mqtt.*`` codes of `faults`. The connection is then closed.
        """
        where = f"{self._settings.host}:{self._settings.port}"
        self._start(where)
        if not self._answered.wait(answer_within_s or self._settings.connect_timeout_s):
            self._lose(TransientError("mqtt.no_connack", f"{where} accepted the connection but not the session"))
        if self._connack is None or self._fault is not None:
            fault = self._fault or TransientError("mqtt.closed_early", f"{where} hung up before answering")
            self.kill()
            raise fault
        return self._connack

    def _start(self, where: str) -> None:
        # Apart from `open`: a fault that it raises holds its variables, and this connection holds the fault. Were the
        # client one of them, it would be in a cycle (see `kill`).
        settings, client = self._settings, self._live_client()
        try:
            if self._is_v5:
                client.connect(
                    settings.host,
                    settings.port,
                    settings.keepalive_s,
                    clean_start=self._identity.clean,
                    properties=connect_properties(settings, is_clean=self._identity.clean),
                )
            else:
                client.connect(settings.host, settings.port, settings.keepalive_s)
        except Exception as error:
            self.kill()
            raise faults.from_connect_error(error, where, is_tls=settings.tls) from error
        others = set(threading.enumerate())
        client.loop_start()
        self._network_thread = _thread_named(f"paho-mqtt-client-{self._identity.client_id}", others)

    @property
    def is_alive(self) -> bool:
        """False once the connection is lost; it stays so."""
        # paho's thread may also end without any callback (select() fails on a closed or too high descriptor).
        if self._network_thread is not None and not self._network_thread.is_alive():
            self._lose(TransientError("mqtt.connection_lost", "the network thread ended"))
        return not self._lost.is_set()

    @property
    def fault(self) -> EdgeError:
        """Why the connection was lost."""
        return self._fault or TransientError("mqtt.connection_lost", "the connection ended")

    def close(self, timeout_s: float = 2.0) -> None:
        """Disconnect in order: the broker discards the will and keeps the session."""
        client = self._client
        if client is not None and self.is_alive:
            client.disconnect()
            self._lost.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End the connection at once, and the network thread with it."""
        self._lose(TransientError("mqtt.connection_lost", "closed by this side"))
        client, self._client = self._client, None
        if client is None:
            return
        # loop_stop alone would wait for every unacknowledged publish; without its socket the thread ends at once.
        sock = client.socket()
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        client.loop_stop()
        # With the last reference paho closes its wake-up sockets: now, and not at some later garbage collection, for a
        # node that reconnects for a week must not run out of descriptors. So no cycle client -> callback -> self.
        client.on_connect = client.on_disconnect = client.on_message = client.on_publish = client.on_subscribe = None

    def _live_client(self) -> Client:
        if self._client is None:
            raise self.fault
        return self._client

    # ---- use

    def subscribe(self, filters: Sequence[tuple[str, bool]]) -> None:
        """Subscribe at QoS 1 and wait for the broker's word.

        Args:
            filters: topic filter, and whether retained messages are wanted (an old event is no event).

        Raises:
            TransientError: ``mqtt.subscribe_refused`` or ``mqtt.no_suback``.
        """
        if self._is_v5:
            wanted = [
                (name, SubscribeOptions(qos=1, retainHandling=0 if retained else 2)) for name, retained in filters
            ]
            result, mid = self._live_client().subscribe(wanted)
        else:
            result, mid = self._live_client().subscribe([(name, 1) for name, _ in filters])
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise TransientError("mqtt.connection_lost", "connection lost while subscribing")
        deadline = time.monotonic() + self._settings.connect_timeout_s
        while (left_s := deadline - time.monotonic()) > 0 and self.is_alive:
            try:
                answered, reasons = self._subscribed.get(timeout=min(left_s, 0.2))
            except queue.Empty:
                continue
            if answered == mid:
                refused = [name for (name, _), reason in zip(filters, reasons, strict=False) if reason >= 0x80]
                if refused:
                    raise TransientError("mqtt.subscribe_refused", f"broker refused to subscribe {', '.join(refused)}")
                return
        raise TransientError("mqtt.no_suback", "broker did not answer a subscription")

    @property
    def pubacks(self) -> queue.SimpleQueue[Puback]:
        """The broker's answers to what was published, in the order of their arrival."""
        return self._pubacks

    def publish(self, wire: WireMessage, *, qos: int, retain: bool, expiry_s: int | None = None) -> int:
        """Hand one message to the network thread.

        Returns:
            The packet id that its PUBACK will carry (QoS 1). Nothing is delivered before that.

        Raises:
            TransientError: ``mqtt.connection_lost`` or ``mqtt.window_full``.
            PermanentError: ``mqtt.topic_refused``: not a topic.
        """
        properties = publish_properties(wire, expiry_s) if self._is_v5 else None
        try:
            info = self._live_client().publish(wire.topic, wire.payload, qos, retain, properties=properties)
        except ValueError as error:
            raise faults.not_taken(0x90, wire.topic) from error
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise TransientError("mqtt.window_full", "too many unacknowledged messages")
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise TransientError("mqtt.connection_lost", "connection lost while publishing")
        return info.mid

    def ack(self, message: Incoming) -> None:
        """Acknowledge a message of this connection."""
        client = self._client
        if message.qos and client is not None and self.is_alive:
            client.ack(message.mid, message.qos)

    # ---- making the client

    def _make_client(self, will: Will | None) -> Client:
        settings = self._settings
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._identity.client_id,
            clean_session=None if self._is_v5 else self._identity.clean,
            protocol=MQTTProtocolVersion.MQTTv5 if self._is_v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = settings.connect_timeout_s
        # The window is kept by the drain, which knows the broker's.
        client.max_inflight_messages_set(MAX_RECEIVE_MAXIMUM)
        client.max_queued_messages_set(settings.max_inflight + 16)
        if settings.username is not None:
            client.username_pw_set(settings.username, credentials.password(settings))
        if settings.tls:
            client.tls_set_context(credentials.tls_context(settings))
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    # ---- facts from the network thread

    @_caught
    def _on_connect(
        self, _client: Client, _userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._lose(faults.refused(reason.value, reason.getName()))
        else:
            self._connack = Connack(
                session_present=flags.session_present,
                is_v5=self._is_v5,
                receive_maximum=getattr(properties, "ReceiveMaximum", MAX_RECEIVE_MAXIMUM),
                max_packet_bytes=getattr(properties, "MaximumPacketSize", None),
            )
        self._answered.set()

    @_caught
    def _on_disconnect(
        self,
        _client: Client,
        _userdata: Any,
        flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._lose(faults.refused(reason.value, reason.getName()))
        elif self._connack is None:
            self._lose(TransientError("mqtt.closed_early", "broker hung up before answering"))
        else:
            self._lose(TransientError("mqtt.connection_lost", f"connection lost: {reason.getName()}"))

    @_caught
    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = None
        if message.qos == 0 and self.incoming.qsize() >= MAX_UNREAD:
            self.overflowed += 1
            return
        self.incoming.put(Incoming(topic, bytes(message.payload), message.qos, message.retain, message.mid))
        self._wake.set()

    @_caught
    def _on_publish(
        self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._pubacks.put(Puback(mid, reason.value))
        self._wake.set()

    @_caught
    def _on_subscribe(
        self, _client: Client, _userdata: Any, mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        self._subscribed.put((mid, [reason.value for reason in reasons]))

    def _lose(self, fault: EdgeError) -> None:
        if not self._lost.is_set():
            self._fault = fault
            self._lost.set()
        self._answered.set()
        self._wake.set()


def _thread_named(name: str, others: set[threading.Thread]) -> threading.Thread | None:
    # None also where the thread has come and gone already; then its callbacks have said why.
    return next((thread for thread in set(threading.enumerate()) - others if thread.name == name), None)
