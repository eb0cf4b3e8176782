from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from edge_agent.errors import TransientError
from edge_agent.log import configure, get_logger
from edge_agent.settings import LogSettings


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_json_line_with_its_part_level_and_time() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    get_logger("edge_agent.uplink.session").info("mqtt_connected", broker="b:1883", text="line\nbreak \ud800")
    [record] = records(stream)
    assert (record["event"], record["part"], record["level"]) == ("mqtt_connected", "uplink.session", "info")
    assert record["timestamp"].endswith("Z")
    assert record["broker"] == "b:1883"


def test_secrets_are_blanked_at_any_depth() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    get_logger("x").info(
        "settings",
        mqtt={"password": "hunter2", "host": "b"},
        api_token="hunter2",
        Authorization="hunter2",
        tokens_out="31",
        mapping="a",
    )
    assert "hunter2" not in stream.getvalue()
    [record] = records(stream)
    assert record["mqtt"] == {"password": "[redacted]", "host": "b"}
    assert (record["tokens_out"], record["mapping"]) == ("31", "a")


def test_an_edge_error_is_spelled_out_with_its_code() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    get_logger("x").warning("held", error=TransientError("disk.full", "no room", free_bytes=12))
    [record] = records(stream)
    assert record["code"] == "disk.full"
    assert record["error"] == {"code": "disk.full", "type": "transient", "detail": "no room", "free_bytes": 12}


def test_a_logger_made_before_the_configuration_obeys_it() -> None:
    early = get_logger("early")
    stream = io.StringIO()
    configure(LogSettings(level="warning"), stream=stream)
    early.info("not shown")
    early.warning("shown")
    assert [record["event"] for record in records(stream)] == ["shown"]


def test_libraries_and_warnings_are_in_the_same_stream_and_form() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    logging.getLogger("paho").warning("socket %s", "closed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
    first, second = records(stream)
    assert (first["event"], first["part"], first["level"]) == ("socket closed", "paho", "warning")
    assert "old call" in second["event"]


def test_an_exception_keeps_its_traceback() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)

    def fail() -> None:
        raise KeyError("a bug")

    try:
        fail()
    except KeyError:
        get_logger("x").exception("port_failed")
    [record] = records(stream)
    assert "KeyError: 'a bug'" in record["exception"]


def test_a_very_long_value_is_shortened() -> None:
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    get_logger("x").info("event", payload="x" * 1_000_000)
    assert len(stream.getvalue()) < 3000


def test_the_console_form_is_for_people() -> None:
    stream = io.StringIO()
    configure(LogSettings(format="console"), stream=stream)
    get_logger("x").info("ready", node="press-4")
    assert "ready" in stream.getvalue()
    assert "node=press-4" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
