from __future__ import annotations

import errno
import socket
import ssl

import pytest

from edge_agent.errors import PermanentError, TransientError
from edge_agent.uplink import faults


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), "mqtt.tls_failed"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "mqtt.bad_host"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "mqtt.port_closed"),
        (TimeoutError("timed out"), "mqtt.connect_timeout"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "mqtt.unreachable"),
        (UnicodeError("label too long"), "mqtt.bad_host"),
    ],
)
def test_every_way_not_to_connect_has_its_code_and_is_worth_another_try(error: Exception, code: str) -> None:
    mapped = faults.from_connect_error(error, "broker:1883", is_tls=False)
    assert isinstance(mapped, TransientError)
    assert mapped.code == code
    assert "broker:1883" in mapped.detail


def test_a_reset_is_a_tls_fault_only_where_tls_was_wanted() -> None:
    reset = ConnectionResetError(errno.ECONNRESET, "reset")
    assert faults.from_connect_error(reset, "b:1", is_tls=True).code == "mqtt.tls_failed"
    assert faults.from_connect_error(reset, "b:1", is_tls=False).code == "mqtt.unreachable"


def test_arguments_that_can_never_work_are_permanent() -> None:
    mapped = faults.from_connect_error(ValueError("Invalid host."), "b:1", is_tls=False)
    assert isinstance(mapped, PermanentError)
    assert mapped.code == "mqtt.bad_settings"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (0x84, "mqtt.protocol_refused"),
        (0x86, "mqtt.auth_refused"),
        (0x87, "mqtt.auth_refused"),
        (0x88, "mqtt.broker_unavailable"),
        (0x8E, "mqtt.session_taken"),
        (0xFF, "mqtt.refused"),
    ],
)
def test_every_refusal_of_a_session_has_a_code(reason: int, code: str) -> None:
    assert faults.refused(reason, "why").code == code


def test_every_puback_reason_has_a_verdict_and_every_bad_one_an_error() -> None:
    for reason in range(256):
        verdict = faults.judge(reason)
        if reason < 0x80:
            assert verdict is faults.Verdict.DELIVERED
            continue
        error = faults.not_taken(reason, "a/b")
        assert error.code.startswith("mqtt.")
        assert isinstance(error, TransientError) == (verdict is faults.Verdict.RETRY)
