"""A spool on a file of its own, and what is put into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.messages import now_ms
from edge_agent.errors import TransientError
from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import Klass, OutboundMessage, Priority
from edge_agent.uplink.spool import Spool

DEADLETTER = "edge/v1/site/node/deadletter"
STUCK = TransientError("worker.stuck", "killed")


_opened: list[Spool] = []


def make_spool(path: Path, **bounds: int) -> Spool:
    # model_construct: tests want bounds smaller than any device should have.
    settings = SpoolSettings.model_construct(**{**SpoolSettings().model_dump(), **bounds})
    _opened.append(Spool(path, settings, deadletter_topic=DEADLETTER))
    return _opened[-1]


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return make_spool(tmp_path / "spool.sqlite")


def put(spool: Spool, event_id: str, priority: Priority = "normal", task: str = "triage") -> object:
    return spool.accept(task, event_id, b'{"id":"x"}', priority, now_ms())


def answer(event_id: str, klass: Klass = "decision", size: int = 10) -> OutboundMessage:
    return OutboundMessage("plant/_edgeai/triage", event_id.encode().ljust(size, b"."), klass=klass)
