"""Structured logs on stderr: JSON for machines, plain text for people; secrets never leave.

``configure`` is called once by an entry point. Before that, loggers work with structlog's defaults, so a library module
may log at any time.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

from edge_agent.errors import EdgeError
from edge_agent.settings import LogSettings

# Words of a key: "api_token" names a secret, "tokens_out" and "mapping" do not.
SECRET_WORDS = frozenset(
    {"password", "passwd", "passphrase", "secret", "token", "authorization", "credential", "credentials", "pin"}
)
_SECRET_PAIRS = ("api_key", "private_key", "signing_key")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MAX_VALUE_CHARS = 2000


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose records carry ``part`` (the module); calls take an event name and keyword facts."""
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(part=name.removeprefix("edge_agent.")))


def configure(settings: LogSettings, *, stream: TextIO | None = None) -> None:
    """Send structlog, stdlib logging and warnings to one stream in one format.

    Args:
        settings: level and format.
        stream: default stderr; stdout stays free for results.
    """
    target = sys.stderr if stream is None else stream
    level = _LEVELS[settings.level]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _expand_error,
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str, ensure_ascii=True)
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=target.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=target),
        # Not cached, so that a second call (a test, a reload of the level) reaches loggers that exist already.
        cache_logger_on_first_use=False,
    )
    bridge = logging.StreamHandler(target)
    bridge.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[_name_of_stdlib_record, structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[bridge], level=max(level, logging.INFO), force=True)
    logging.captureWarnings(capture=True)
    warnings.simplefilter("default", ResourceWarning)


def redact(_: Any, __: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank the values of keys that name secrets, at any depth, and shorten very long strings."""
    for key, value in record.items():
        record[key] = _redacted(key, value)
    return record


def _redacted(key: str, value: Any) -> Any:
    if isinstance(value, str | bytes) and _names_secret(key.lower()):
        return "[redacted]"
    if isinstance(value, dict):
        return {k: _redacted(str(k), v) for k, v in value.items()}
    if isinstance(value, str) and len(value) > _MAX_VALUE_CHARS and key != "exception":
        return value[:_MAX_VALUE_CHARS] + f"… ({len(value)} characters)"
    return value


def _names_secret(key: str) -> bool:
    return not SECRET_WORDS.isdisjoint(re.split(r"[\W_]+", key)) or any(pair in key for pair in _SECRET_PAIRS)


def _expand_error(_: Any, __: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """``error=<EdgeError>`` becomes its code, type and detail."""
    error = record.get("error")
    if isinstance(error, EdgeError):
        record["error"] = error.as_dict()
        record.setdefault("code", error.code)
    return record


def _name_of_stdlib_record(_: Any, __: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    source = record.get("_record")
    if isinstance(source, logging.LogRecord):
        record.setdefault("part", source.name)
    return record
