"""Everything that must run before the plant's day begins: keys, registry, broker, link, node."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.broker import BrokerAddress, close_client, connect
from deploy.demo.broker import DemoBroker, start_broker
from deploy.demo.bundles import Variant, machine_target, make_variants
from deploy.demo.children import Child
from deploy.demo.consumer import Consumer
from deploy.demo.ledger import Ledger
from deploy.demo.link import Link
from deploy.demo.plant import Plant
from deploy.demo.wire import USERNAME, open_client
from deploy.desired import default_not_after, next_rev, send_desired
from deploy.keys import Keys, init_keys
from deploy.registry import Registry
from deploy.release import Published, publish
from deploy.serve import RegistryServer
from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.messages import DesiredState
from edge_agent.contract.task import load_task
from edge_agent.contract.topics import NodeTopics

NODE = NodeTopics("demo-plant", "press-gateway")
TASK = "triage"
DECISIONS = f"acme/{NODE.site}/press-shop/line-3/cell-6/_edgeai/{TASK}"
TELEMETRY_S = 0.5


@dataclass(frozen=True)
class Release:
    """A published variant."""

    variant: Variant
    published: Published


@dataclass(frozen=True)
class Stage:
    """The running parts, for the story to play on."""

    broker: DemoBroker
    link: Link
    agent: Child
    plant: Plant
    consumer: Consumer
    ledger: Ledger
    keys: Keys
    releases: tuple[Release, ...]

    def order(self, release: Release, *, probation_decisions: int, probation_s: float) -> int:
        """Tell the node to run a release, as `edge-deploy desired set` does; returns the revision."""
        address = BrokerAddress("127.0.0.1", self.broker.port, username=USERNAME, protocol=self.broker.dialect)
        with connect(address) as session:
            rev = next_rev(session, NODE, self.keys.trusted_desired())
            state = DesiredState(
                node=NODE.node,
                rev=rev,
                release=release.published.release,
                digest=release.published.digest,
                not_after=default_not_after(),
                probation_decisions=probation_decisions,
                probation_s=probation_s,
            )
            send_desired(session, NODE, state, self.keys.private("desired"))
        return rev

    def check(self) -> None:
        """Raise when a process has ended by itself.

        Raises:
            PermanentError: ``demo.child_ended``.
        """
        self.broker.child.check()
        self.agent.check()


@contextlib.contextmanager
def built(directory: Path, bundle: Path, broker: Literal["auto", "mosquitto", "amqtt"]) -> Iterator[Stage]:
    """Start everything, and end everything whatever happens.

    Args:
        directory: for keys, registry, configuration, state and logs.
        bundle: what v1 to v4 are made of.
        broker: which one to use.

    Raises:
        EdgeError: whatever does not start.
    """
    with contextlib.ExitStack() as ending:
        keys, registry = _found_registry(directory)
        variants = make_variants(bundle, directory / "bundles")
        releases = tuple(Release(v, _publish(v, registry, keys)) for v in variants)
        server = ending.enter_context(RegistryServer(registry.directory, quiet=True))
        server.start()
        ending.callback(server.shutdown)
        running = start_broker(broker, directory)
        ending.callback(running.child.stop)
        link = Link("127.0.0.1", running.port)
        ending.callback(link.close)
        ledger = Ledger(load_task(bundle / "tasks" / TASK / "task.yaml"))
        ears = open_client("demo-mes", running.port, running.protocol)
        ending.callback(close_client, ears)
        consumer = Consumer(ears, NODE, DECISIONS, ledger, _wall_ms)
        ending.callback(consumer.close)
        mouth = open_client("demo-plant", running.port, running.protocol)
        ending.callback(close_client, mouth)
        plant = Plant(mouth, NODE.events(TASK), ledger, _wall_ms)
        ending.callback(plant.close)
        config = directory / "agent.toml"
        config.write_text(_agent_config(directory, link.port, server.url, keys), "utf-8")
        agent = Child("edge-agent", [sys.executable, "-m", "edge_agent", "run", "--config", str(config)], directory)
        ending.callback(agent.stop)
        yield Stage(running, link, agent, plant, consumer, ledger, keys, releases)


def _found_registry(directory: Path) -> tuple[Keys, Registry]:
    keys = init_keys(directory / "keys")
    registry = Registry(directory / "registry", keys)
    registry.init()
    return keys, registry


def _publish(variant: Variant, registry: Registry, keys: Keys) -> Published:
    read_manifest(variant.bundle)
    return publish(variant.bundle, registry, publishers=keys.trusted_publishers(), sign_with=keys.private("publisher"))


def _agent_config(directory: Path, port: int, registry_url: str, keys: Keys) -> str:
    return f"""\
state_dir = "{directory / "state"}"

[node]
enterprise = "acme"
site = "{NODE.site}"
area = "press-shop"
line = "line-3"
cell = "cell-6"
name = "{NODE.node}"

[mqtt]
host = "127.0.0.1"
port = {port}
username = "{USERNAME}"
password = "demo"
connect_timeout_s = 2.0
reconnect_max_s = 1.0

[worker]
restart_backoff_max_s = 1.0
thread_sweep_s = 0

[update]
registry_url = "{registry_url}"
trust_dir = "{keys.trust_dir}"
target = "{machine_target()}"

[telemetry]
period_s = {TELEMETRY_S}
"""


def _wall_ms() -> float:
    return time.time() * 1000
