"""A whole node under test: the daemon as a real process, with keys, a registry and releases of its own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.__main__ import main as edge_deploy
from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.messages import release_path
from edge_agent.contract.topics import NodeTopics
from tests.fakes.mqtt_peer import Peer, wait_until

TOPICS = NodeTopics("plant1", "gw1")
DECISIONS = "acme/plant1/forming/line2/cell3/_edgeai/triage"
EVENTS = TOPICS.events("triage")
READY_S = 30.0


class Daemon:
    """``edge-agent run`` in a process of its own.

    Args:
        directory: holds keys, registry, configuration and log; ``state_dir`` defaults to a folder in it.
        port: of the broker, or of a proxy before it.
    """

    def __init__(
        self, directory: Path, port: int, *, state_dir: Path | None = None, **sections: dict[str, Any]
    ) -> None:
        self.directory = directory
        self.state_dir = state_dir or directory / "state"
        self.log = directory / "agent.log"
        self.config = directory / "config.toml"
        self._process: subprocess.Popen[bytes] | None = None
        self._deploy("keys", "init", str(directory / "keys"))
        self._deploy("registry", "init", str(directory / "registry"), "--keys", str(directory / "keys"))
        node = {
            "enterprise": "acme",
            "site": "plant1",
            "area": "forming",
            "line": "line2",
            "cell": "cell3",
            "name": "gw1",
        }
        settings: dict[str, dict[str, Any]] = {
            "node": node,
            "mqtt": {"host": "127.0.0.1", "port": port, "reconnect_max_s": 1.0, "connect_timeout_s": 5.0},
            "worker": {"threads": 1},
            "telemetry": {"period_s": 1.0},
            "update": {"registry_url": f"file://{directory}/registry", "trust_dir": str(directory / "keys/trust")},
        }
        for name, values in sections.items():
            settings[name] = {**settings.get(name, {}), **values}
        self.config.write_text(f'state_dir = "{self.state_dir}"\n' + "".join(map(_section, settings.items())))

    def start(self) -> Daemon:
        """Start it and wait until it is connected: before its first subscription the broker keeps nothing for it."""
        with self.log.open("ab") as log:
            began = log.tell()
            command = [sys.executable, "-m", "edge_agent", "run", "--config", str(self.config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(lambda: not self.alive or b'"mqtt_connected"' in self.log.read_bytes()[began:], READY_S)
        assert self.alive, self.log.read_text()[-3000:]
        return self

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(60)
        self._process = None
        return status

    def close(self) -> None:
        if self.alive:
            self.end(signal.SIGKILL)

    def worker_pid(self) -> int | None:
        """The serving worker, found as the kernel sees it."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.pid), "-f", "edge_agent.runtime.worker"], capture_output=True, check=False
        )
        pids = found.stdout.split()
        return int(pids[0]) if pids else None

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the serving worker, and to nobody else."""
        pid = self.worker_pid()
        assert pid is not None
        os.kill(pid, number)

    def publish(self, bundle: Path) -> str:
        """Publish a bundle; its release path."""
        target = [str(self.directory / "registry"), "--keys", str(self.directory / "keys"), "--sign"]
        self._deploy("release", "publish", str(bundle), "--registry", *target)
        manifest, _ = read_manifest(bundle)
        return release_path(manifest.name, manifest.version, manifest.target)

    def order(self, release: str, broker_port: int, *more: str, decisions: int = 1, seconds: float = 0.1) -> None:
        """Sign and publish a desired state."""
        where = ["--site", "plant1", "--node", "gw1", "--release", release.removesuffix("/manifest.json")]
        paths = ["--registry", str(self.directory / "registry"), "--keys", str(self.directory / "keys")]
        watch = ["--probation-decisions", str(decisions), "--probation-s", str(seconds)]
        self._deploy("desired", "set", *where, *paths, "--broker", f"127.0.0.1:{broker_port}", *watch, *more)

    @staticmethod
    def _deploy(*arguments: str) -> None:
        assert edge_deploy(list(arguments)) == 0, arguments


def install(daemon: Daemon, bundle: Path, peer: Peer, port: int, *more: str) -> None:
    """Order ``bundle`` and see it committed, over events that its probation needs."""
    release = daemon.publish(bundle)
    daemon.order(release, port, *more)
    reported(peer, state="probation", release=release)
    numbers = itertools.count()

    def is_committed() -> bool:
        # More than one: probation is reported before the swap, so the old model may still answer the first.
        event = {"id": f"warm-up {release} {next(numbers)}", "machine": "press-1", "text": "hydraulic oil low"}
        peer.deliver(EVENTS, json.dumps(event))
        time.sleep(0.2)
        return bool(_reports(peer, state="committed", release=release))

    wait_until(is_committed, 60.0)


def reported(peer: Peer, **wanted: Any) -> dict[str, Any]:
    """Wait for a ``model/reported`` with these fields."""
    wait_until(lambda: _reports(peer, **wanted), 60.0)
    return _reports(peer, **wanted)[-1]


def _reports(peer: Peer, **wanted: Any) -> list[dict[str, Any]]:
    reports = [json.loads(seen.payload) for seen in list(peer.seen) if seen.topic == TOPICS.model_reported]
    return [report for report in reports if wanted.items() <= report.items()]


def decisions_of(peer: Peer, prefix: str = "") -> dict[str, set[str]]:
    """Decision ids by event id, for events whose id begins with ``prefix``."""
    found: dict[str, set[str]] = {}
    for seen in list(peer.seen):
        if seen.topic == DECISIONS:
            decision = json.loads(seen.payload)
            if decision["event_id"].startswith(prefix):
                found.setdefault(decision["event_id"], set()).add(decision["decision_id"])
    return found


def _section(item: tuple[str, dict[str, Any]]) -> str:
    name, values = item
    # JSON's strings, numbers and booleans are TOML's as well.
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
