"""One short conversation with the MQTT broker: read what is retained, leave something retained.

MQTT 5 first, because only there does the broker say that it refused a publication; 3.1.1 where 5 is not spoken.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.errors import EdgeError, PermanentError, TransientError, from_os_error

Protocol = Literal["auto", "5", "3.1.1"]
_V5, _V311 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
_PROTOCOLS = {"auto": (_V5, _V311), "5": (_V5,), "3.1.1": (_V311,)}
# A broker that does not know MQTT 5 may answer with silence; that much patience before the older dialect is tried.
_FALLBACK_S = 3.0
_NOT_AUTHORISED = ("Not authorized", "Bad user name or password", "Banned")


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is and who we are.

    Args:
        host: name or address.
        port: TCP port.
        username: None for an anonymous session.
        password_file: its first line is the password.
        ca_file: PEM of the authority that signed the broker's certificate; switches TLS on.
        timeout_s: bound of every wait.
        protocol: auto tries MQTT 5, then 3.1.1.
    """

    host: str
    port: int = 1883
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: float = 10.0
    protocol: Protocol = "auto"


def parse_address(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT``, ``HOST`` or ``[v6]:PORT``.

    Raises:
        ValueError: when the port is not a number in 1..65535.
    """
    host, port = text, "1883"
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host, int(port)


class BrokerSession:
    """A connected session; made by `connect`."""

    def __init__(self, client: paho.Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._subscribed: queue.SimpleQueue[list[ReasonCode]] = queue.SimpleQueue()
        self._published: queue.SimpleQueue[tuple[int, ReasonCode]] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[paho.MQTTMessage] = queue.SimpleQueue()
        # Callbacks only enqueue: an exception in one would kill paho's network thread.
        client.on_subscribe = lambda _c, _u, _mid, codes, _p: self._subscribed.put(codes)
        client.on_publish = lambda _c, _u, mid, code, _p: self._published.put((mid, code))
        client.on_message = lambda _c, _u, message: self._messages.put(message)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1 and wait until the broker has taken it.

        Raises:
            TransientError: ``broker.timeout``.
            PermanentError: ``broker.refused`` with the broker's reason.
        """
        mid = self._client.publish(topic, payload, qos=1, retain=retain).mid
        deadline = time.monotonic() + self._timeout_s
        while True:
            acknowledged, code = self._wait(self._published, deadline, f"acknowledgement of {topic}")
            if acknowledged != mid:
                continue
            if code.is_failure:
                raise PermanentError("broker.refused", f"broker refused {topic}: {code}", topic=topic)
            return

    def retained(self, *topics: str) -> dict[str, bytes]:
        """Everything retained under the topic filters.

        MQTT does not say "that was all". So a marker is sent to ourselves after the subscription: a broker delivers
        in order, and what has not arrived before the marker is not retained. Where the broker forbids the marker's
        topic, the wait ends after a quiet second.
        """
        marker = f"edge/v1/_marker/{secrets.token_hex(8)}"
        self._subscribe([*topics, marker])
        self._client.publish(marker, b"", qos=1)
        found: dict[str, bytes] = {}
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                message = self._messages.get(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
            if message.topic == marker:
                break
            if message.retain:
                found[message.topic] = bytes(message.payload)
        self._client.unsubscribe([*topics, marker])
        return found

    def _subscribe(self, topics: list[str]) -> None:
        self._client.subscribe([(topic, 1) for topic in topics])
        codes = self._wait(self._subscribed, time.monotonic() + self._timeout_s, "acknowledgement of the subscription")
        # The last one is the marker, which may be forbidden.
        if any(code.is_failure for code in codes[:-1]):
            raise PermanentError("broker.refused", f"broker refused to subscribe: {', '.join(map(str, codes))}")

    def _wait(self, source: queue.SimpleQueue[Any], deadline: float, what: str) -> Any:
        try:
            return source.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty as error:
            raise TransientError("broker.timeout", f"no {what} within {self._timeout_s:g} s") from error


@contextlib.contextmanager
def connect(address: BrokerAddress) -> Iterator[BrokerSession]:
    """Connect, and disconnect at the end.

    Raises:
        TransientError: ``net.refused``, ``broker.unreachable`` or ``broker.timeout``.
        PermanentError: ``broker.not_authorised``, ``broker.tls``.
    """
    client = _connected(address)
    try:
        yield BrokerSession(client, address.timeout_s)
    finally:
        close_client(client)


def close_client(client: paho.Client) -> None:
    """Disconnect, end the network thread and let go of the callbacks.

    paho closes its wake-up sockets with the last reference to the client. In a cycle client -> callback -> whoever
    holds the client, they would wait for the garbage collector.
    """
    client.disconnect()
    client.loop_stop()
    client.on_connect = client.on_disconnect = client.on_message = client.on_publish = client.on_subscribe = None


def _connected(address: BrokerAddress) -> paho.Client:
    *earlier, last = _PROTOCOLS[address.protocol]
    for protocol in earlier:
        try:
            return _attempt(address, protocol, min(_FALLBACK_S, address.timeout_s))
        except TransientError as error:
            # A closed port does not open in another dialect; a wrong password is a PermanentError.
            if error.code not in ("broker.unreachable", "broker.timeout"):
                raise
    return _attempt(address, last, address.timeout_s)


def _attempt(address: BrokerAddress, protocol: MQTTProtocolVersion, timeout_s: float) -> paho.Client:
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        f"edge-deploy-{secrets.token_hex(6)}",
        protocol=protocol,
        reconnect_on_failure=False,
    )
    connected = threading.Event()
    outcome: list[ReasonCode] = []

    def ended(code: ReasonCode) -> None:
        outcome.append(code)
        connected.set()

    client.on_connect = lambda _c, _u, _f, code, _p: ended(code)
    client.on_disconnect = lambda _c, _u, _f, code, _p: ended(code)
    try:
        if address.username is not None:
            client.username_pw_set(address.username, _password(address))
        if address.ca_file is not None:
            client.tls_set(str(address.ca_file))
        client.connect(address.host, address.port, keepalive=60)
    except OSError as error:
        raise _unreachable(address, error) from error
    client.loop_start()
    if not connected.wait(timeout_s):
        client.loop_stop()
        raise TransientError("broker.timeout", f"no CONNACK from {address.host}:{address.port}")
    first = outcome[0]
    if not first.is_failure and client.is_connected():
        return client
    client.loop_stop()
    if str(first) in _NOT_AUTHORISED:
        raise PermanentError("broker.not_authorised", f"broker refused the session: {first}")
    raise TransientError("broker.unreachable", f"{address.host}:{address.port} did not accept MQTT: {first}")


def _password(address: BrokerAddress) -> str | None:
    if address.password_file is None:
        return None
    lines = address.password_file.read_text("utf-8").splitlines()
    return lines[0] if lines else ""


def _unreachable(address: BrokerAddress, error: OSError) -> EdgeError:
    mapped = from_os_error(error, f"connecting to {address.host}:{address.port}")
    if mapped.code in ("disk.missing", "disk.permission") and error.filename:
        return mapped
    if mapped.code == "net.refused":
        return mapped
    return TransientError("broker.unreachable", mapped.detail)
