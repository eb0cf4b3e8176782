"""Real parts for device tests: the committed reference bundle, an engine on it, and variants made from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.contract.dsse import generate_key
from edge_agent.contract.manifest import read_manifest
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings
from tests.fakes.brokers import BrokerProcess, mosquitto, running
from tests.fakes.bundles import BundleVariant
from tests.fakes.daemon import DECISIONS, TOPICS
from tests.fakes.mqtt_peer import Peer

COMMITTED = Path(__file__).parents[2] / "export/reference/bundle"


@pytest.fixture(scope="session")
def reference_bundle() -> Path:
    """The bundle in the repository; EDGE_TEST_BUNDLE names another one to test with."""
    path = Path(os.environ.get("EDGE_TEST_BUNDLE") or COMMITTED)
    if not (path / "manifest.json").is_file():
        pytest.skip(f"no bundle at {path}: run `make reference`, or set EDGE_TEST_BUNDLE")
    return path


@pytest.fixture(scope="session")
def reference_digest(reference_bundle: Path) -> str:
    return read_manifest(reference_bundle)[1]


@pytest.fixture(scope="session")
def engine(reference_bundle: Path, reference_digest: str) -> Engine:
    return Engine(open_installed_bundle(reference_bundle, reference_digest), 1)


@pytest.fixture
def variant(reference_bundle: Path, tmp_path: Path) -> Callable[[], BundleVariant]:
    """Copies of the reference bundle that a test may change and sign anew."""
    numbers = iter(range(100))
    return lambda: BundleVariant(reference_bundle, tmp_path / f"bundle-{next(numbers)}", generate_key())


@pytest.fixture
def worker_settings() -> WorkerSettings:
    return WorkerSettings(threads=1)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    yield from running(mosquitto(tmp_path))


@pytest.fixture
def peer(broker: BrokerProcess) -> Iterator[Peer]:
    one = Peer(broker.port, DECISIONS, f"{TOPICS.base}/#")
    yield one
    one.close()


@pytest.fixture
def real_worker(
    reference_bundle: Path, reference_digest: str, worker_settings: WorkerSettings
) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(reference_bundle, reference_digest, worker_settings, grace_s=0.3)
    yield worker
    worker.stop()
