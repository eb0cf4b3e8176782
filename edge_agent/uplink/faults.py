"""Every way in which a broker can fail us, as a stable ``mqtt.*`` code."""

from __future__ import annotations

import socket
import ssl
from enum import Enum

from edge_agent.errors import EdgeError, PermanentError, TransientError

# All connection faults are transient: a person can cure each of them on the broker's side while we keep trying.
# Source: MQTT 5.0 table 2-6 (reason codes).
_CONNECT_CODES = {
    0x81: "mqtt.malformed_packet",
    0x82: "mqtt.protocol_error",
    0x84: "mqtt.protocol_refused",
    0x85: "mqtt.client_id_refused",
    0x86: "mqtt.auth_refused",
    0x87: "mqtt.auth_refused",
    0x88: "mqtt.broker_unavailable",
    0x89: "mqtt.broker_busy",
    0x8A: "mqtt.banned",
    0x8C: "mqtt.auth_refused",
    0x8E: "mqtt.session_taken",
    0x93: "mqtt.receive_maximum_exceeded",
    0x95: "mqtt.packet_too_large",
    0x97: "mqtt.quota_exceeded",
    0x98: "mqtt.disconnected_by_operator",
    0x9A: "mqtt.retain_unsupported",
    0x9B: "mqtt.qos_unsupported",
    0x9C: "mqtt.use_another_server",
    0x9D: "mqtt.server_moved",
    0x9F: "mqtt.connection_rate_exceeded",
}


def refused(reason: int, name: str) -> TransientError:
    """A CONNACK or DISCONNECT with a bad reason code."""
    return TransientError(_CONNECT_CODES.get(reason, "mqtt.refused"), f"broker says: {name}", reason=reason)


# ssl.SSLError, gaierror, ConnectionError and TimeoutError are all OSErrors: the first row that matches counts.
_SOCKET_FAULTS: tuple[tuple[type[Exception], str, str], ...] = (
    (ssl.SSLError, "mqtt.tls_failed", "TLS failed with"),
    (socket.gaierror, "mqtt.bad_host", "cannot resolve"),
    (ConnectionRefusedError, "mqtt.port_closed", "nothing listens on"),
    (TimeoutError, "mqtt.connect_timeout", "no answer from"),
    (OSError, "mqtt.unreachable", "cannot reach"),
    (UnicodeError, "mqtt.bad_host", "not a host name:"),
)


def from_connect_error(error: Exception, where: str, *, is_tls: bool) -> EdgeError:
    """Map what the socket or TLS layer raised while connecting to ``where`` (host:port)."""
    # The TCP handshake does not end in a reset: this server hung up on the TLS handshake.
    if is_tls and isinstance(error, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
        return TransientError("mqtt.tls_failed", f"{where} hung up during the TLS handshake")
    for kind, code, sentence in _SOCKET_FAULTS:
        if isinstance(error, kind):
            return TransientError(code, f"{sentence} {where}: {getattr(error, 'strerror', None) or error}")
    # paho refuses impossible arguments with ValueError.
    return PermanentError("mqtt.bad_settings", f"cannot connect to {where}: {error}")


class Verdict(Enum):
    """What a PUBACK says about a message."""

    DELIVERED = "delivered"
    RETRY = "retry"
    BURY = "bury"


# Source: MQTT 5.0 section 3.4.2.1. 0x10 = no matching subscribers: the broker took it.
_PUBACK_RETRY = frozenset({0x80, 0x83, 0x91, 0x97})
_PUBACK_CODES = {
    0x80: "mqtt.publish_failed",
    0x83: "mqtt.publish_failed",
    0x87: "mqtt.not_authorised",
    0x90: "mqtt.topic_refused",
    0x91: "mqtt.packet_id_in_use",
    0x97: "mqtt.quota_exceeded",
    0x99: "mqtt.payload_refused",
}


def judge(reason: int) -> Verdict:
    """Retry what the broker may take later (busy, quota); bury what it will never take (not authorised, bad topic)."""
    if reason < 0x80:
        return Verdict.DELIVERED
    return Verdict.RETRY if reason in _PUBACK_RETRY else Verdict.BURY


def not_taken(reason: int, topic: str) -> EdgeError:
    """The error of a message that the broker did not take."""
    code = _PUBACK_CODES.get(reason, "mqtt.publish_refused")
    kind = TransientError if judge(reason) is Verdict.RETRY else PermanentError
    return kind(code, f"broker refused a message on {topic} with reason 0x{reason:02x}", reason=reason, topic=topic)
