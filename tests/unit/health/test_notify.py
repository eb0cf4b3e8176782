from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.health.notify import Notifier


class Systemd:
    """The receiving end of sd_notify."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(5)

    def heard(self) -> dict[str, str]:
        lines = self._socket.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def heard_nothing(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(5)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    listener = Systemd(str(tmp_path / "notify"))
    yield listener
    listener.close()


def test_without_systemd_nothing_is_sent_and_nothing_fails() -> None:
    notifier = Notifier({})
    assert not notifier.is_enabled
    assert not notifier.ready("up")
    assert notifier.watchdog_interval_s is None
    assert not notifier.progress()


def test_ready_status_and_stopping_arrive(systemd: Systemd, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert notifier.ready("serving triage 1.0.0")
    assert systemd.heard() == {"READY": "1", "STATUS": "serving triage 1.0.0"}
    assert notifier.stopping("draining")
    assert systemd.heard() == {"STOPPING": "1", "STATUS": "draining"}
    assert notifier.extend_timeout(30)
    assert systemd.heard() == {"EXTEND_TIMEOUT_USEC": "30000000"}


def test_an_abstract_socket_is_reached() -> None:
    name = f"edge-agent-test-{os.getpid()}"
    listener = Systemd("\0" + name)
    assert Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
    assert listener.heard() == {"READY": "1"}
    listener.close()


def test_a_status_is_sent_when_it_changes_and_cannot_smuggle_in_an_assignment(systemd: Systemd, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    notifier.status("idle\nWATCHDOG=trigger")
    assert systemd.heard() == {"STATUS": "idle WATCHDOG=trigger"}
    notifier.status("idle\nWATCHDOG=trigger")
    assert systemd.heard_nothing()


def test_progress_feeds_the_watchdog_no_more_often_than_needed(systemd: Systemd, tmp_path: Path) -> None:
    environment = {
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    notifier = Notifier(environment)
    assert notifier.watchdog_interval_s == 15.0
    assert notifier.progress()
    assert systemd.heard() == {"WATCHDOG": "1"}
    assert not notifier.progress()
    assert systemd.heard_nothing()


@pytest.mark.parametrize(
    "environment",
    [{"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}],
)
def test_a_watchdog_that_is_not_ours_or_makes_no_sense_is_not_fed(environment: dict[str, str]) -> None:
    assert Notifier(environment).watchdog_interval_s is None


def test_a_vanished_systemd_is_no_failure(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")}).ready()


def test_a_turn_that_may_last_longer_widens_the_watchdog_and_nothing_narrows_it(
    systemd: Systemd, tmp_path: Path
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "90000000"})
    assert not notifier.allow(60), "the unit's own value is enough"
    assert notifier.allow(180)
    assert systemd.heard() == {"WATCHDOG_USEC": "240000000"}
    assert not notifier.allow(30)
    assert systemd.heard_nothing()


def test_without_a_watchdog_there_is_nothing_to_widen(systemd: Systemd, tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).allow(180)
    assert systemd.heard_nothing()
