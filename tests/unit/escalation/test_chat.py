"""The site's server against a real HTTP server that misbehaves in every way it can."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import EdgeError, PermanentError, TransientError
from edge_agent.escalation.api_key import read_api_key
from edge_agent.escalation.chat import ChatEndpoint
from edge_agent.escalation.transport import MAX_REPLY_BYTES
from edge_agent.settings import EscalationSettings
from tests.fakes.certificates import Authority
from tests.fakes.chat_server import ChatServer, Turn, completion
from tests.fakes.escalations import GOOD, case_of
from tests.fakes.faults import fault_of
from tests.fakes.mqtt_peer import wait_until

KEY = "sk-zq-4711-very-secret"
PLAIN = json.dumps(GOOD)
PATIENCE_S = 10.0
HURRY_S = 0.4


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(PLAIN) as one:
        yield one


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(f"{KEY}\n")
    return path


def endpoint(url: str, **settings: Any) -> ChatEndpoint:
    section = EscalationSettings.model_validate({"base_url": url, "model": "large", **settings})
    return ChatEndpoint(url, "large", section)


def test_a_question_is_one_post_with_the_key_and_the_answer_is_its_text(server: ChatServer, key_file: Path) -> None:
    assert endpoint(server.url, api_key_file=key_file).ask(case_of(), PATIENCE_S) == PLAIN
    [asked] = server.asked
    assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.headers["Content-Type"] == "application/json"
    assert asked.body["model"] == "large"
    assert asked.user == {"event": {"text": "oil pressure low"}}


@pytest.mark.parametrize(
    ("turn", "kind", "code"),
    [
        (Turn(status=500), TransientError, "escalation.server_error"),
        (Turn(status=502), TransientError, "escalation.server_error"),
        (Turn(status=503), TransientError, "escalation.server_error"),
        (Turn(status=503, headers={"Retry-After": "2"}), TransientError, "escalation.busy"),
        (Turn(status=429, headers={"Retry-After": "7"}), TransientError, "escalation.busy"),
        (Turn(status=429, headers={"Retry-After": "9" * 50}), TransientError, "escalation.busy"),
        (Turn(status=408), TransientError, "escalation.server_error"),
        (Turn(status=401), PermanentError, "escalation.denied"),
        (Turn(status=403), PermanentError, "escalation.denied"),
        (Turn(status=404), PermanentError, "escalation.http_error"),
        (Turn(status=204), PermanentError, "escalation.http_error"),
        (
            Turn(status=301, headers={"Location": "http://127.0.0.1:9/v1"}),
            PermanentError,
            "escalation.redirect_refused",
        ),
        (Turn(status=307, headers={"Location": "/v1/elsewhere"}), PermanentError, "escalation.redirect_refused"),
        (Turn(cut=True), TransientError, "escalation.unreachable"),
        (Turn(body=b"{}", length="5000000"), TransientError, "escalation.unreachable"),
        (Turn(body=b"x" * (MAX_REPLY_BYTES + 1)), PermanentError, "escalation.reply_too_large"),
        (Turn(endless=True), PermanentError, "escalation.reply_too_large"),
        (Turn(body=b""), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b"<html>502</html>"), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b"\xff\xfe\x00"), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b"[" * 200_000), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b"[]"), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b'{"choices":[]}'), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b'{"choices":[{"message":{"content":null}}]}'), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b'{"choices":[{"message":{"content":["a"]}}]}'), PermanentError, "escalation.reply_invalid"),
        (Turn(body=b'{"error":{"message":"no"}}'), PermanentError, "escalation.reply_invalid"),
    ],
)
def test_a_broken_or_hostile_reply_has_a_code_and_says_whether_to_try_again(
    server: ChatServer, turn: Turn, kind: type[EdgeError], code: str
) -> None:
    server.next(turn)
    fault = fault_of(lambda: endpoint(server.url).ask(case_of(), PATIENCE_S))
    assert (type(fault), fault.code) == (kind, code)


@pytest.mark.parametrize(
    "turn",
    [Turn(stall="headers"), Turn(stall="body"), Turn(drip="headers"), Turn(drip="body")],
    ids=["silent", "stops in the body", "drips headers", "drips the body"],
)
def test_a_server_that_keeps_one_waiting_is_left_at_the_deadline(server: ChatServer, turn: Turn) -> None:
    # A drip is never silent for long: a timeout that begins anew with each byte would wait for ever.
    server.next(turn)
    assert fault_of(lambda: endpoint(server.url).ask(case_of(), HURRY_S)).code == "escalation.no_answer"


def test_a_server_that_never_accepts_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = []
        for _ in range(3):  # fills the queue of connections that nobody accepts
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            waiting.append(client)
        fault = fault_of(lambda: endpoint(f"http://127.0.0.1:{port}/v1").ask(case_of(), HURRY_S))
        for client in waiting:
            client.close()
    assert fault.code == "escalation.no_answer"


def test_a_tls_handshake_that_never_comes_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        assert fault_of(lambda: endpoint(url).ask(case_of(), HURRY_S)).code == "escalation.no_answer"


def test_nothing_that_listens_and_nothing_that_resolves_are_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/v1", "http://no-such-host.invalid/v1"):
        fault = fault_of(lambda url=url: endpoint(url).ask(case_of(), PATIENCE_S))  # type: ignore[misc]
        assert (type(fault), fault.code) == (TransientError, "escalation.unreachable")


def test_no_time_left_asks_nobody(server: ChatServer) -> None:
    assert fault_of(lambda: endpoint(server.url).ask(case_of(), 0.0)).code == "escalation.no_answer"
    assert not server.asked


def test_the_servers_wish_for_patience_is_handed_on_unless_it_is_absurd(server: ChatServer) -> None:
    server.next(Turn(status=429, headers={"Retry-After": "7"}), Turn(status=429, headers={"Retry-After": "9" * 50}))
    one = endpoint(server.url)
    assert fault_of(lambda: one.ask(case_of(), PATIENCE_S)).context["retry_after_s"] == 7
    assert "retry_after_s" not in fault_of(lambda: one.ask(case_of(), PATIENCE_S)).context


def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(server: ChatServer, key_file: Path) -> None:
    with ChatServer(PLAIN) as other:
        server.next(Turn(status=307, headers={"Location": f"{other.url}/chat/completions"}))
        fault = fault_of(lambda: endpoint(server.url, api_key_file=key_file).ask(case_of(), PATIENCE_S))
        assert fault.code == "escalation.redirect_refused"
        assert not other.asked


def test_a_server_that_knows_no_response_format_is_asked_plainly_from_then_on() -> None:
    with ChatServer(PLAIN, takes_response_format=False) as server:
        one = endpoint(server.url)
        assert [one.ask(case_of(), PATIENCE_S) for _ in range(2)] == [PLAIN, PLAIN]
        assert ["response_format" in asked.body for asked in server.asked] == [True, False, False]


def test_a_server_that_refuses_both_forms_is_not_taken_for_one_without_response_format(server: ChatServer) -> None:
    one = endpoint(server.url)
    server.next(Turn(status=400), Turn(status=400))
    fault = fault_of(lambda: one.ask(case_of(), PATIENCE_S))
    assert (fault.code, fault.context["status"]) == ("escalation.http_error", 400)
    assert one.ask(case_of(), PATIENCE_S) == PLAIN
    assert "response_format" in server.asked[-1].body


def test_a_refused_key_is_not_tried_again_until_it_is_replaced(server: ChatServer, key_file: Path) -> None:
    one = endpoint(server.url, api_key_file=key_file)
    server.next(Turn(status=401))
    for _ in range(3):
        assert fault_of(lambda: one.ask(case_of(), PATIENCE_S)).code == "escalation.denied"
    assert len(server.asked) == 1
    key_file.write_text("another-key")
    assert one.ask(case_of(), PATIENCE_S) == PLAIN
    assert server.asked[-1].headers["Authorization"] == "Bearer another-key"


# ---- TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def tls_server(authority: Authority) -> ssl.SSLContext:
    pair = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


def test_a_server_signed_by_the_sites_authority_is_trusted_and_no_other(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    with ChatServer(PLAIN, tls=tls_server(authority)) as server:
        assert endpoint(server.url, ca_file=authority.ca_file).ask(case_of(), PATIENCE_S) == PLAIN
        for settings in ({}, {"ca_file": stranger.ca_file}):
            fault = fault_of(lambda s=settings: endpoint(server.url, **s).ask(case_of(), PATIENCE_S))  # type: ignore[misc]
            assert (type(fault), fault.code) == (PermanentError, "escalation.tls_untrusted")
        assert len(server.asked) == 1


def test_a_certificate_for_another_name_is_not_trusted(authority: Authority) -> None:
    with ChatServer(PLAIN, tls=tls_server(authority)) as server:
        url = f"https://localhost:{server.port}/v1"
        fault = fault_of(lambda: endpoint(url, ca_file=authority.ca_file).ask(case_of(), PATIENCE_S))
        assert fault.code == "escalation.tls_untrusted"


def test_plain_http_where_tls_was_wanted_is_unreachable(server: ChatServer) -> None:
    url = server.url.replace("http:", "https:")
    assert fault_of(lambda: endpoint(url).ask(case_of(), PATIENCE_S)).code == "escalation.unreachable"
    assert not server.asked


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_authorities_that_cannot_be_read_are_named(server: ChatServer, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    url = server.url.replace("http:", "https:")
    fault = fault_of(lambda: endpoint(url, ca_file=path).ask(case_of(), PATIENCE_S))
    assert (type(fault), fault.code) == (PermanentError, "escalation.ca_file")


# ---- the stop


def test_a_stop_ends_a_question_under_way_and_refuses_the_next(server: ChatServer) -> None:
    one = endpoint(server.url)
    server.next(Turn(stall="body"))
    faults: list[EdgeError] = []
    asking = threading.Thread(target=lambda: faults.append(fault_of(lambda: one.ask(case_of(), 60.0))))
    asking.start()
    wait_until(lambda: server.asked)
    one.abort()
    asking.join(10)
    assert not asking.is_alive()
    assert fault_of(lambda: one.ask(case_of(), PATIENCE_S)).code == "escalation.unreachable"
    assert [type(fault) for fault in faults] == [TransientError]


# ---- the key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o666, 0o601])
def test_a_key_that_others_can_read_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert fault_of(lambda: read_api_key(key_file)).code == "escalation.key_file"
    key_file.chmod(0o400)
    assert read_api_key(key_file) == KEY


def test_a_systemd_credential_shows_its_access_list_as_the_groups_bits(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(key_file.parent))
    assert read_api_key(key_file) == KEY
    key_file.chmod(0o444)
    assert fault_of(lambda: read_api_key(key_file)).code == "escalation.key_file"


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"two words", b"two\nlines", b"key\r\nX-Injected: 1", b"\xffkey", b"k\0y", b"k" * 5000],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_holds_no_key_is_refused_without_quoting_it(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    fault = fault_of(lambda: read_api_key(key_file))
    assert fault.code == "escalation.key_file"
    assert "X-Injected" not in str(fault)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("absent", ".", "pipe"):
        assert fault_of(lambda name=name: read_api_key(tmp_path / name)).code == "escalation.key_file"  # type: ignore[misc]


@pytest.mark.parametrize(
    "turn",
    [
        Turn(status=401, body=f'{{"error":"Incorrect API key provided: {KEY}"}}'.encode()),
        Turn(status=500, body=KEY.encode(), headers={"X-Echo": KEY}),
        Turn(status=302, headers={"Location": f"http://127.0.0.1/{KEY}"}),
        Turn(body=KEY.encode()),
        Turn(body=completion(KEY)[:-3]),
    ],
)
def test_the_key_is_in_no_error_even_where_the_server_repeats_it(
    server: ChatServer, key_file: Path, turn: Turn
) -> None:
    server.next(turn)
    fault = fault_of(lambda: endpoint(server.url, api_key_file=key_file).ask(case_of(), PATIENCE_S))
    told = "".join(traceback.format_exception(fault)) + json.dumps(fault.as_dict(), default=str)
    assert KEY not in told


# ---- the doctor's question


def test_the_probe_asks_for_the_models_and_shows_nothing_of_any_event(server: ChatServer, key_file: Path) -> None:
    said = endpoint(server.url, api_key_file=key_file).probe()
    assert "lists model 'large'" in said
    [asked] = server.asked
    assert (asked.method, asked.path, asked.raw) == ("GET", "/v1/models", b"")


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        (Turn(status=401), "escalation.denied"),
        (Turn(body=b'{"data":[{"id":"another"}]}'), "escalation.http_error"),
        (Turn(body=b"{}"), "escalation.reply_invalid"),
        (Turn(body=b'{"data":[{"id":[]}]}'), "escalation.reply_invalid"),
    ],
)
def test_the_probe_names_what_is_wrong(server: ChatServer, turn: Turn, code: str) -> None:
    server.next(turn)
    assert fault_of(lambda: endpoint(server.url).probe()).code == code


def test_a_server_without_a_list_of_models_passes_the_probe(server: ChatServer) -> None:
    server.next(Turn(status=404))
    assert "lists no models" in endpoint(server.url).probe()
