"""Payloads on MQTT (contract v1), as pydantic models. Unknown fields are ignored; an unknown major is refused."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from edge_agent.contract.escalation_messages import Escalation
from edge_agent.contract.manifest import Manifest, Name, Sha256
from edge_agent.contract.payload import Payload
from edge_agent.contract.routing import Route

UpdateState = Literal[
    "idle",
    "downloading",
    "verifying",
    "installing",
    "trial",
    "probation",
    "committed",
    "rolling_back",
    "rolled_back",
    "failed",
]


def _is_none(value: object) -> bool:
    return value is None


class ModelRef(Payload):
    """Which model answered."""

    name: str
    version: str
    digest: Sha256


def model_ref(manifest: Manifest, digest: str) -> ModelRef:
    """Which model a bundle holds.

    Args:
        manifest: the bundle's.
        digest: hex SHA-256 of its bytes.
    """
    return ModelRef(name=manifest.name, version=manifest.version, digest=digest)


class Decision(Payload):
    """What the device decided about one event: the data of the CloudEvents message.

    ``specialist`` and ``vetoed`` are left out where there is nothing to say, as they were before there was routing.
    """

    schema_version: Literal[1] = 1
    decision_id: str
    event_id: str
    task: str
    model: ModelRef
    decision: dict[str, Any]
    confidence: dict[str, float]
    route: Route
    unsure_fields: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    truncated: bool = False
    specialist: str | None = Field(default=None, exclude_if=_is_none)
    vetoed: str | None = Field(default=None, exclude_if=_is_none)
    latency_ms: float
    timestamp_ms: int
    # Left out where there was none: such a decision looks as it did before there were escalations.
    escalation: Escalation | None = Field(default=None, exclude_if=lambda escalation: escalation is None)


def decision_id(task: str, event_id: str, model_digest: str) -> str:
    """Hash of task, event and model, so that a redelivered event is answered under the same id."""
    return hashlib.sha256(f"{task}\n{event_id}\n{model_digest}".encode()).hexdigest()[:32]


class ErrorInfo(Payload):
    """An `EdgeError` in a payload."""

    code: str
    type: str
    detail: str


class Status(Payload):
    """``status``: the birth certificate, and (as the will) the death certificate."""

    schema_version: Literal[1] = 1
    state: Literal["online", "draining", "offline"]
    boot_id: str
    since_ms: int
    version: str


class Meta(Payload):
    """``meta``: what this node is and can do; republished on every connect."""

    schema_version: Literal[1] = 1
    version: str
    hardware: dict[str, Any]
    execution_providers: tuple[str, ...]
    tasks: tuple[str, ...]
    worker_threads: int | None = None
    commands: tuple[str, ...] = ()


class DesiredState(Payload):
    """``model/desired``, the payload inside the DSSE envelope: which release this node should run.

    ``rev`` grows with every change, so an old envelope replayed by a hostile broker is refused. ``release`` is the TUF
    target path of the release's manifest. ``not_after`` blocks updates only, never inference.
    """

    schema_version: Literal[1] = 1
    node: str
    rev: int = Field(ge=1)
    release: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]{1,200}$")]
    digest: Sha256
    not_after: datetime
    allow_downgrade: bool = False
    retry_bad: bool = Field(default=False, description="try a digest again that failed on this node before")
    probation_decisions: int = Field(default=50, ge=1)
    probation_s: float = Field(default=300.0, gt=0)


def release_path(name: Name, version: Name, target: str) -> str:
    """TUF target path of a release's manifest."""
    return f"{name}/{version}/{target}/manifest.json"


class Reported(Payload):
    """``model/reported``: where this node is on the way to its desired state."""

    schema_version: Literal[1] = 1
    rev: int | None
    state: UpdateState
    release: str | None = None
    digest: str | None = None
    active: ModelRef | None = None
    previous: ModelRef | None = None
    progress: float = 0.0
    error: ErrorInfo | None = None
    timestamp_ms: int


class DeadLetter(Payload):
    """``deadletter``: an event that could not be decided, and why."""

    schema_version: Literal[1] = 1
    event_id: str | None
    task: str | None
    error: ErrorInfo
    received_ms: int


class QueueTelemetry(Payload):
    """``tele/queue``: depths and every drop, counted since the store was created."""

    schema_version: Literal[1] = 1
    inbox: int
    outbox: int
    dead_letters: int
    dropped: dict[str, int]
    escalations_pending: int = 0
    escalations: dict[str, int] = Field(default={}, description="by outcome, since the store was created")
    timestamp_ms: int


class InferenceTelemetry(Payload):
    """``tele/inference``: since the worker's start; latencies over the last window.

    ``workers_outgrown`` are those of the ``worker_deaths`` that the agent brought about, because a worker leaked.
    """

    schema_version: Literal[1] = 1
    decisions: int
    errors: int
    worker_deaths: int
    workers_outgrown: int = 0
    p50_ms: float | None
    p95_ms: float | None
    passes_per_decision: float | None
    timestamp_ms: int


class HardwareTelemetry(Payload):
    """``tele/hw``: an absent sensor is null, never a guess."""

    schema_version: Literal[1] = 1
    cpu_percent: float | None
    memory_available_bytes: int | None
    disk_free_bytes: int | None
    temperature_c: float | None
    agent_rss_bytes: int | None
    worker_rss_bytes: int | None
    timestamp_ms: int


def now_ms() -> int:
    """Wall clock in milliseconds since the epoch, UTC (for timestamps only, never for measuring)."""
    return int(datetime.now(UTC).timestamp() * 1000)
