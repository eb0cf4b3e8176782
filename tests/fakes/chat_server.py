"""A real OpenAI-compatible HTTP server on loopback that misbehaves on request.

    with ChatServer() as server:
        server.next(Turn(status=500), Turn(content="no"))

Turns are consumed in order, one a request; without one the server answers `ChatServer.content`.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

DRIP_S = 0.05


@dataclass(frozen=True)
class Turn:
    """One answer, proper or not.

    Args:
        status: HTTP status.
        content: text of the answer; None takes the server's own.
        body: the whole reply instead of a chat completion.
        headers: further headers.
        cut: close the connection in the middle of the body.
        stall: say nothing more from there on, until the server ends.
        drip: from there on one byte at a time, without end.
        endless: a body without end and without a length.
        length: announce this Content-Length.
        wait_for: answer only when this is set.
        always: stay the turn of every further request.
    """

    status: int = 200
    content: str | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    stall: Literal["headers", "body"] | None = None
    drip: Literal["headers", "body"] | None = None
    endless: bool = False
    length: str | None = None
    wait_for: threading.Event | None = None
    always: bool = False


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.raw)
        return parsed

    @property
    def system(self) -> str:
        return str(self.body["messages"][0]["content"])

    @property
    def user(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.body["messages"][1]["content"])
        return parsed


class ChatServer:
    """Answers POST /v1/chat/completions and GET /v1/models on a free port.

    Args:
        content: the text of every answer for which there is no turn.
        tls: serve https.
        port: where it listens; 0 chooses a free one.
        takes_response_format: False answers 400 to a request with one.
    """

    def __init__(
        self,
        content: str = "{}",
        *,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        takes_response_format: bool = True,
    ) -> None:
        self.content = content
        self.asked: list[Asked] = []
        self.takes_response_format = takes_response_format
        self._turns: deque[Turn] = deque()
        self._ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                server.answer(self)

            def do_POST(self) -> None:
                server.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._httpd.daemon_threads = True
        self._scheme = "http"
        if tls is not None:
            self._scheme = "https"
            self._httpd.socket = tls.wrap_socket(self._httpd.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._httpd.server_address[1])

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/v1"

    def next(self, *turns: Turn) -> None:
        self._turns.extend(turns)

    def clear(self) -> None:
        self._turns.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        asked = Asked(request.command, request.path, dict(request.headers.items()), raw)
        self.asked.append(asked)
        turn = self._turn(asked)
        request.close_connection = True
        if turn.wait_for is not None:
            turn.wait_for.wait(20)
        with contextlib.suppress(OSError):  # the client had enough
            self._say(request, turn)

    def _turn(self, asked: Asked) -> Turn:
        if self._turns:
            return self._turns[0] if self._turns[0].always else self._turns.popleft()
        if asked.path.endswith("/models"):
            return Turn(body=json.dumps({"object": "list", "data": [{"id": "large"}]}).encode())
        if not self.takes_response_format and b"response_format" in asked.raw:
            return Turn(status=400, body=b'{"error":"unknown field response_format"}')
        return Turn()

    def _say(self, request: BaseHTTPRequestHandler, turn: Turn) -> None:
        if turn.stall == "headers":
            self._ended.wait()
            return
        if turn.drip == "headers":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            self._drip(request)
            return
        content = self.content if turn.content is None else turn.content
        body = completion(content) if turn.body is None else turn.body
        request.send_response(turn.status)
        for name, value in turn.headers.items():
            request.send_header(name, value)
        if not (turn.endless or turn.drip):
            request.send_header("Content-Length", turn.length or str(len(body)))
        request.end_headers()
        if turn.stall == "body" or turn.cut:
            request.wfile.write(body[: len(body) // 2])
            if turn.stall:
                self._ended.wait()
            return
        if turn.drip == "body":
            self._drip(request)
        request.wfile.write(body)
        while turn.endless:
            request.wfile.write(b" " * 65536)

    def _drip(self, request: BaseHTTPRequestHandler) -> None:
        while not self._ended.wait(DRIP_S):
            request.wfile.write(b"x")


def completion(content: str) -> bytes:
    """A chat completion as servers send it."""
    message = {"role": "assistant", "content": content}
    reply = {"id": "c-1", "object": "chat.completion", "model": "large", "choices": [{"index": 0, "message": message}]}
    return json.dumps(reply).encode()
