"""Real brokers on free loopback ports, started and killed by tests."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MOSQUITTO = shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin:/usr/bin:/usr/local/bin")
START_TIMEOUT_S = 15.0


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class BrokerProcess:
    """A broker in a process of its own, always on the same port.

    Args:
        command: what starts it.
        port: where it listens.
        log: where its output goes.
    """

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.port = port
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until the port answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"broker did not start: {self._log.read_text('utf-8', 'replace')[-2000:]}")

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """End the process; SIGTERM lets it save its sessions, SIGKILL does not."""
        if self._process is not None:
            self._process.send_signal(sig)
            self._process.wait(10)
            self._process = None


def mosquitto(directory: Path, *lines: str, anonymous: bool = True) -> BrokerProcess:
    """A mosquitto with persistence and a configuration of its own (not yet started)."""
    port = free_port()
    config = directory / f"mosquitto-{port}.conf"
    config.write_text(
        "\n".join(
            [
                f"listener {port} 127.0.0.1",
                f"allow_anonymous {'true' if anonymous else 'false'}",
                "persistence true",
                f"persistence_location {directory}/",
                f"persistence_file mosquitto-{port}.db",
                "user root",
                *lines,
            ]
        )
        + "\n"
    )
    return BrokerProcess([MOSQUITTO or "mosquitto", "-c", str(config)], port, directory / f"mosquitto-{port}.log")


def amqtt(directory: Path) -> BrokerProcess:
    """The pure-Python broker of the demo, which speaks MQTT 3.1.1 only (not yet started)."""
    port = free_port()
    config = directory / f"amqtt-{port}.yaml"
    config.write_text(
        "listeners:\n"
        f"  default:\n    type: tcp\n    bind: 127.0.0.1:{port}\n"
        "plugins:\n"
        "  amqtt.plugins.authentication.AnonymousAuthPlugin:\n    allow_anonymous: true\n"
    )
    code = "from amqtt.scripts.broker_script import main; main()"
    return BrokerProcess([sys.executable, "-c", code, "-c", str(config)], port, directory / f"amqtt-{port}.log")


def running(broker: BrokerProcess) -> Iterator[BrokerProcess]:
    """What a fixture yields from: a broker that is started before the test and stopped after it."""
    broker.start()
    yield broker
    broker.stop()
