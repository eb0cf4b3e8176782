"""An MQTT client of the demo's own, for plant and consumer: they share no code with the node's uplink."""

from __future__ import annotations

import threading

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.errors import TransientError, from_os_error

USERNAME = "demo"
_CONNECT_S = 10.0
_MAX_INFLIGHT = 100


def open_client(name: str, port: int, protocol: MQTTProtocolVersion) -> paho.Client:
    """Connect to the demo's broker and start the network thread.

    Args:
        name: client id.
        port: on 127.0.0.1.
        protocol: MQTT 5 or 3.1.1.

    Raises:
        TransientError: ``net.refused`` or ``broker.unreachable``.
    """
    client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=protocol)
    client.username_pw_set(USERNAME, "demo")
    client.max_inflight_messages_set(_MAX_INFLIGHT)
    connected = threading.Event()
    outcome: list[ReasonCode] = []

    def answered(code: ReasonCode) -> None:
        outcome.append(code)
        connected.set()

    client.on_connect = lambda _c, _u, _f, code, _p: answered(code)
    try:
        client.connect("127.0.0.1", port, keepalive=30)
    except OSError as error:
        raise from_os_error(error, f"connecting {name} to the broker") from error
    client.loop_start()
    if not connected.wait(_CONNECT_S) or outcome[0].is_failure:
        client.loop_stop()
        raise TransientError("broker.unreachable", f"the broker did not accept {name}: {outcome or 'no answer'}")
    return client
