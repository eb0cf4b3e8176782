"""The demo's MQTT broker: mosquitto where installed, else the pure-Python amqtt, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paho.mqtt.enums import MQTTProtocolVersion

from deploy.demo.children import Child
from edge_agent.errors import PermanentError

Kind = Literal["mosquitto", "amqtt"]
_SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
_START_S = 15.0


@dataclass(frozen=True)
class DemoBroker:
    """A running broker.

    Args:
        kind: which one.
        port: on 127.0.0.1.
        child: its process.
    """

    kind: Kind
    port: int
    child: Child

    @property
    def dialect(self) -> Literal["5", "3.1.1"]:
        """Its newest MQTT, as settings name it."""
        return "5" if self.kind == "mosquitto" else "3.1.1"

    @property
    def protocol(self) -> MQTTProtocolVersion:
        """Its newest MQTT, as paho names it."""
        return MQTTProtocolVersion.MQTTv5 if self.kind == "mosquitto" else MQTTProtocolVersion.MQTTv311

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.kind} (MQTT {self.dialect}{'' if self.kind == 'mosquitto' else ', embedded'})"


def start_broker(wanted: Kind | Literal["auto"], directory: Path) -> DemoBroker:
    """Start a broker on a free port and wait until it listens.

    Args:
        wanted: auto prefers mosquitto.
        directory: for its configuration, its persistence and its log.

    Raises:
        PermanentError: ``demo.no_broker`` when neither is installed, ``demo.child_ended`` when it does not start.
    """
    mosquitto = shutil.which("mosquitto", path=_SYSTEM_PATH)
    if wanted != "amqtt" and mosquitto:
        return _listening("mosquitto", mosquitto, directory)
    if wanted != "mosquitto" and importlib.util.find_spec("amqtt"):
        return _listening("amqtt", sys.executable, directory)
    raise PermanentError("demo.no_broker", "neither a mosquitto binary nor the amqtt package is installed")


def _start_mosquitto(binary: str, port: int, directory: Path) -> Child:
    store = directory / "mosquitto"
    store.mkdir(exist_ok=True)
    config = directory / "mosquitto.conf"
    config.write_text(
        f"""\
listener {port} 127.0.0.1
allow_anonymous true
# Started as root it would become another user, who cannot read this directory.
user {"root" if os.geteuid() == 0 else "mosquitto"}
persistence true
persistence_location {store}/
# The plant's events wait here while the node is cut off: none may be dropped.
max_queued_messages 0
max_queued_bytes 0
""",
        "utf-8",
    )
    return Child("mosquitto", [binary, "-c", str(config)], directory)


def _start_amqtt(python: str, port: int, directory: Path) -> Child:
    return Child("amqtt", [python, "-m", "deploy.demo.embedded_broker", str(port)], directory)


def _listening(kind: Kind, program: str, directory: Path) -> DemoBroker:
    begin = _start_mosquitto if kind == "mosquitto" else _start_amqtt
    port = free_port()
    child = begin(program, port, directory)
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        child.check()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
            continue
        return DemoBroker(kind, port, child)
    child.stop()
    raise PermanentError("demo.child_ended", f"{kind} did not listen within {_START_S:g} s:\n{child.tail()}")


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
