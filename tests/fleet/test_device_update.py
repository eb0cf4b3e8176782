"""What the publisher writes, the device's own updater installs: the two sides share only the contract."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from deploy.desired import sign_desired
from deploy.keys import Keys
from deploy.registry import Registry
from deploy.release import publish
from edge_agent.contract.messages import DesiredState
from edge_agent.settings import UpdateSettings
from edge_agent.update.updater import Updater
from tests.fakes.update_ports import FakeClock, FakePorts
from tests.fleet.conftest import MakeBundle
from tests.update.conftest import find_in_this_process


def test_two_published_releases_are_installed_one_after_the_other(
    tmp_path: Path, keys: Keys, registry: Registry, make_bundle: MakeBundle
) -> None:
    settings = UpdateSettings(
        registry_url=registry.directory.as_uri(), trust_dir=keys.trust_dir, target="cpu-x86_64", reserve_disk_bytes=0
    )
    ports = FakePorts()
    clock = FakeClock(datetime.now(UTC) + timedelta(seconds=1))
    updater = Updater(settings, tmp_path / "state", "press-4", ports, clock=clock, find_release=find_in_this_process)
    updater.resume()
    for rev, version in enumerate(["1.0.0", "1.1.0"], start=1):
        done = publish(make_bundle(version), registry, publishers=keys.trusted_publishers())
        order = DesiredState(
            node="press-4",
            rev=rev,
            release=done.release,
            digest=done.digest,
            not_after=clock.now() + timedelta(hours=1),
            probation_decisions=3,
            probation_s=5.0,
        )
        updater.on_desired(sign_desired(order, keys.private("desired")))
        while updater.advance():
            pass
        reported = updater.reported()
        assert (reported.state, reported.rev, reported.error) == ("committed", rev, None)
        assert ports.serving == done.digest
