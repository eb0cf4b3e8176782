"""Settings of the daemon: command line over environment over file over defaults, checked as a whole.

File: TOML, ``/etc/edge-agent/config.toml`` or ``--config``. Environment: ``EDGE_AGENT_MQTT__HOST=broker``.
Command line: ``--mqtt.host broker``. Sections are frozen and handed to the part that needs them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from edge_agent.contract.topics import check_level, decision_topic
from edge_agent.errors import PermanentError

DEFAULT_CONFIG = Path("/etc/edge-agent/config.toml")
ENV_PREFIX = "EDGE_AGENT_"
DECISION_LEVELS = ("enterprise", "site", "area", "line", "cell", "node", "task")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeSettings(_Section):
    """Who and where this node is; the levels of the Unified Namespace."""

    enterprise: str = Field(default="enterprise", description="first level of the Unified Namespace")
    site: str = Field(default="site", description="also part of every management topic: edge/v1/<site>/<name>/…")
    area: str = "area"
    line: str = "line"
    cell: str = "cell"
    name: str = Field(default="node", description="unique within the site; the MQTT client id is derived from it")
    decision_topic: str = Field(
        default="{enterprise}/{site}/{area}/{line}/{cell}/_edgeai/{task}", description="where decisions are published"
    )

    @field_validator("enterprise", "site", "area", "line", "cell", "name")
    @classmethod
    def _is_level(cls, value: str) -> str:
        try:
            return check_level(value, "name")
        except PermanentError as error:
            raise ValueError(error.detail) from error

    @field_validator("decision_topic")
    @classmethod
    def _is_template(cls, value: str) -> str:
        try:
            topic = decision_topic(value, dict.fromkeys(DECISION_LEVELS, "x"))
        except PermanentError as error:
            raise ValueError(error.detail) from error
        if not topic or topic.startswith("$") or any(c in "+#" or not c.isprintable() for c in topic):
            raise ValueError("not a topic to publish on: empty, with a wildcard or control character, or the broker's")
        return value

    def decision_topic_for(self, task: str) -> str:
        """Where decisions of ``task`` are published."""
        levels = {name: getattr(self, name) for name in DECISION_LEVELS[:5]}
        return decision_topic(self.decision_topic, {**levels, "node": self.name, "task": task})


class EventSource(_Section):
    """A topic beside ``events/<task>`` whose messages are events of ``task``."""

    topic: str = Field(min_length=1, max_length=512)
    task: str


class MqttSettings(_Section):
    """The one management connection."""

    host: str = Field(default="localhost", description="the broker")
    port: int = Field(default=1883, ge=1, le=65535)
    protocol: Literal["auto", "5", "3.1.1"] = Field(default="auto", description="auto: MQTT 5, then 3.1.1")
    username: str | None = None
    password: SecretStr | None = None
    password_file: Path | None = Field(default=None, description="preferred to password: not seen by other processes")
    tls: bool = False
    ca_file: Path | None = Field(default=None, description="authorities that the broker must be signed by; PEM")
    cert_file: Path | None = Field(default=None, description="client certificate; PEM, together with key_file")
    key_file: Path | None = Field(default=None, description="key of the client certificate; PEM")
    keepalive_s: int = Field(default=30, ge=5, le=3600)
    connect_timeout_s: Positive = Field(default=10.0, description="for the connection and the broker's answer together")
    reconnect_max_s: Positive = Field(default=60.0, description="longest pause between attempts; full jitter below it")
    session_expiry_s: int = Field(default=7 * 24 * 3600, ge=0, description="how long the broker keeps events for us")
    max_inflight: int = Field(default=20, ge=1, le=1000, description="messages sent and not yet acknowledged")
    max_packet_bytes: int = Field(default=262_144, ge=1024, description="larger incoming packets are refused")
    sources: tuple[EventSource, ...] = Field(default=(), description="tables of topic and task, beside events/<task>")

    @model_validator(mode="after")
    def _tls_files_make_sense(self) -> MqttSettings:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if self.password is not None and self.password_file is not None:
            raise ValueError("give password or password_file, not both")
        return self


class SpoolSettings(_Section):
    """Inbox, outbox and dead letters: one SQLite file."""

    inbox_max_events: int = Field(default=10_000, ge=1, description="events that wait; beyond it the drop policy acts")
    outbox_max_bytes: int = Field(default=64 << 20, ge=65_536, description="messages that wait for the broker")
    outbox_max_age_s: Positive = Field(default=7 * 24 * 3600.0, description="older messages are dropped, and counted")
    dead_letters_max: int = Field(default=1000, ge=1, description="events kept that could not be decided")
    answered_ids_max: int = Field(default=100_000, ge=1000, description="remembered to recognise redeliveries")
    drain_per_s: Positive = Field(default=500.0, description="rate at which the outbox drains after a reconnect")


class WorkerSettings(_Section):
    """The inference worker process."""

    threads: int = Field(
        default=0, ge=0, le=256, description="0: what an installation's sweep found, else half the cores, one to four"
    )
    thread_sweep_s: float = Field(
        default=60.0, ge=0, description="an installation measures thread counts for this long at most; 0: never"
    )
    niceness: int = Field(default=0, ge=0, le=19, description="how far the worker stands back for other programs")
    memory_limit_bytes: int = Field(default=2 << 30, ge=64 << 20, description="address-space growth past the load")
    rss_limit_bytes: int = Field(
        default=0,
        ge=0,
        description="a larger worker is replaced between two events; 0: 256 MiB and half beyond the load",
    )
    together: int = Field(default=4, ge=1, le=16, description="waiting events that may share passes; 1: none do")
    event_cache_bytes: int = Field(
        default=16 << 20, ge=0, description="what events of a task begin with, kept to skip it; 0: nothing is kept"
    )
    decision_cache_bytes: int = Field(
        default=8 << 20, ge=0, description="answers to repeated events of a task; 0: each is decided anew"
    )
    prefix_dir: Path | None = Field(
        default=None, description="states of prompts' prefixes, kept over restarts; default: prefixes in state_dir"
    )
    start_timeout_s: Positive = Field(default=60.0, description="from the start of the process to a loaded bundle")
    restart_backoff_max_s: Positive = Field(default=30.0, description="longest pause before a dead worker's restart")


class UpdateSettings(_Section):
    """Where releases come from and what a candidate must prove."""

    registry_url: str | None = Field(default=None, description="base URL of the registry: https, http or file")
    trust_dir: Path = Field(
        default=Path("/etc/edge-agent/trust"), description="root.json, desired*.pem, publisher*.pem"
    )
    target: Literal["cpu-arm64", "cpu-x86_64", "cuda-jetson", "qnn-htp", "openvino"] | None = None
    reserve_disk_bytes: int = Field(default=64 << 20, ge=0, description="kept free when a release is fetched")
    bandwidth_bytes_per_s: int = Field(default=0, ge=0, description="0: unlimited")
    trial_p95_ms_max: Positive = Field(default=2000.0, description="slower candidates are refused")
    trial_rss_bytes_max: int = Field(default=2 << 30, ge=64 << 20, description="larger candidates are refused")
    probation_error_rate_max: float = Field(
        default=0.02, ge=0, le=1, description="share of failed decisions; more rolls back"
    )
    probation_worker_deaths_max: int = Field(default=1, ge=0, description="more than this many roll back")
    probation_p95_ms_max: Positive = Field(default=2000.0, description="slower decisions roll back")

    @field_validator("registry_url")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("https://", "http://", "file://")):
            raise ValueError("must start with https://, http:// or file://")
        return value


class EscalationSettings(_Section):
    """Who may be asked about what the model is unsure of. By default nobody is, and nothing is connected."""

    base_url: str | None = Field(default=None, description="OpenAI-compatible server, as in https://llm.example/v1")
    model: str | None = Field(default=None, description="model name at that server; together with base_url")
    api_key_file: Path | None = Field(default=None, description="mode 0600; sent as a bearer token, over https only")
    ca_file: Path | None = Field(default=None, description="authorities that the server must be signed by; PEM")
    mqtt: bool = Field(default=False, description="tasks may ask on <base>/escalations; answers are subscribed")
    timeout_max_s: Positive = Field(default=3600.0, description="cap of every task's timeout_s")
    concurrency: int = Field(default=2, ge=1, le=16, description="requests to the server at a time")
    answer_max_tokens: int = Field(default=1024, ge=16, description="the server stops an answer here")
    pending_max: int = Field(
        default=1000, ge=1, description="escalations that wait; beyond it the best guess is published"
    )
    pending_max_bytes: int = Field(default=16 << 20, ge=65_536, description="as pending_max, in bytes")

    @model_validator(mode="after")
    def _server_is_whole(self) -> EscalationSettings:
        if (self.base_url is None) != (self.model is None):
            raise ValueError("base_url and model go together")
        if self.base_url is None:
            if self.api_key_file is not None or self.ca_file is not None:
                raise ValueError("api_key_file and ca_file need base_url")
            return self
        try:
            parts = urlsplit(self.base_url)
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"base_url is malformed: {error}") from error
        is_plain = self.base_url.isascii() and self.base_url.isprintable() and not set(self.base_url) & set(" ?#@")
        if parts.scheme not in {"http", "https"} or not parts.hostname or not is_plain:
            raise ValueError("base_url must be http(s)://host[:port]/path in ASCII, without credentials or query")
        if self.api_key_file is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError("api_key_file needs https: over http everyone on the line could read the key")
        return self


class TelemetrySettings(_Section):
    """Metrics on ``tele/*``."""

    period_s: Positive = Field(default=30.0, description="pause between two messages of a kind")


class LogSettings(_Section):
    """Structured logs on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Settings(BaseSettings):
    """Everything the daemon can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    state_dir: Path = Field(
        default=Path("/var/lib/edge-agent"), description="queues, slots and blobs; survives updates"
    )
    node: NodeSettings = NodeSettings()
    mqtt: MqttSettings = MqttSettings()
    spool: SpoolSettings = SpoolSettings()
    worker: WorkerSettings = WorkerSettings()
    update: UpdateSettings = UpdateSettings()
    escalation: EscalationSettings = EscalationSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    log: LogSettings = LogSettings()

    @property
    def worker_here(self) -> WorkerSettings:
        """The worker section with its places below ``state_dir``."""
        prefix_dir = self.worker.prefix_dir or self.state_dir / "prefixes"
        return self.worker.model_copy(update={"prefix_dir": prefix_dir})


def load_settings(config: Path | None, arguments: Sequence[str] = ()) -> Settings:
    """Read all sources and check them together.

    Args:
        config: a TOML file; None reads `DEFAULT_CONFIG` if it exists.
        arguments: command-line overrides such as ``["--mqtt.host", "broker"]``.

    Returns:
        Frozen settings.

    Raises:
        PermanentError: ``settings.unreadable`` for the file, ``settings.invalid`` listing every bad setting.
    """
    from_file = _read_toml(config)
    try:
        cli: CliSettingsSource[Any] = CliSettingsSource(
            Settings, cli_parse_args=list(arguments), cli_exit_on_error=False, cli_prog_name="edge-agent run"
        )
        return _with_sources(from_file, cli)
    except SettingsError as error:
        raise PermanentError("settings.invalid", str(error)) from error
    except ValidationError as error:
        # The value is left out of the message: it may be a password.
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)]
        raise PermanentError("settings.invalid", "; ".join(faults), faults=faults) from error


def _with_sources(from_file: dict[str, Any], cli: CliSettingsSource[Any]) -> Settings:
    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return cli, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    return Sourced()


def _read_toml(config: Path | None) -> dict[str, Any]:
    path = config or DEFAULT_CONFIG
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        if config is None and isinstance(error, FileNotFoundError):
            return {}
        raise PermanentError("settings.unreadable", f"cannot read {path}: {error}", path=str(path)) from error
