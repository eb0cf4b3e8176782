"""A real HTTP server on loopback that serves a directory and misbehaves on request.

    with StaticServer(directory) as server:
        server.fault("/blobs/…", Fault(cut_after_bytes=1000))

Faults are consumed in the order they were set; a path without one is served properly, ranges included.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_RANGE = re.compile(r"bytes=(\d+)-$")


@dataclass(frozen=True)
class Fault:
    """One misbehaviour.

    Args:
        status: answer with this code instead.
        location: redirect target that goes with it.
        cut_after_bytes: send so many bytes of the body, then close the connection.
        ignore_range: answer 200 with the whole file although a range was asked.
        wrong_range: answer 206 from another offset than was asked.
        endless: go on sending after the file's end, without announcing a length.
        length: announce this Content-Length instead of the true one.
        body: serve these bytes instead of the file's.
        stall: accept the request and say nothing until the server ends.
        always: do not consume the fault.
    """

    status: int | None = None
    location: str | None = None
    cut_after_bytes: int | None = None
    ignore_range: bool = False
    wrong_range: bool = False
    endless: bool = False
    length: str | None = None
    body: bytes | None = None
    stall: bool = False
    always: bool = False


class StaticServer:
    """Serves ``directory`` on a free loopback port, over TLS where a context is given."""

    def __init__(self, directory: Path, tls: ssl.SSLContext | None = None) -> None:
        self.directory = directory
        self.requests: list[tuple[str, str | None]] = []  # (path, Range header)
        self.sent_bytes: dict[str, int] = defaultdict(int)
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10
            server_version = "static"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self._scheme = "http"
        if tls is not None:
            self._scheme = "https"
            self._httpd.socket = tls.wrap_socket(self._httpd.socket, server_side=True, do_handshake_on_connect=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._httpd.server_address[1]}"

    def fault(self, path: str, *faults: Fault) -> None:
        """Queue faults for a path (or for every path that ends so)."""
        self._faults[path].extend(faults)

    def clear_faults(self) -> None:
        self._faults.clear()

    def requested(self, fragment: str) -> list[tuple[str, str | None]]:
        return [request for request in self.requests if fragment in request[0]]

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
        self.requests.append((request.path, request.headers.get("Range")))
        fault = self._next_fault(request.path)
        request.close_connection = True
        if fault.stall:
            self._ended.wait()
            return
        if fault.status is not None:
            request.send_response(fault.status)
            if fault.location:
                request.send_header("Location", fault.location)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        path = self.directory / request.path.lstrip("/")
        if fault.body is None and not path.is_file():
            request.send_error(404)
            return
        content = path.read_bytes() if fault.body is None else fault.body
        start = self._start(request, fault)
        if start > len(content) or (start == len(content) and start > 0):
            request.send_error(416)
            return
        self._send(request, content, start, fault)

    def _start(self, request: BaseHTTPRequestHandler, fault: Fault) -> int:
        match = _RANGE.match(request.headers.get("Range") or "")
        return 0 if match is None or fault.ignore_range else int(match[1])

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, start: int, fault: Fault) -> None:
        partial = request.headers.get("Range") is not None and not fault.ignore_range
        request.send_response(206 if partial else 200)
        if partial:
            claimed = start + 7 if fault.wrong_range else start
            request.send_header("Content-Range", f"bytes {claimed}-{len(content) - 1}/{len(content)}")
        body = content[start:]
        if not fault.endless:
            request.send_header("Content-Length", str(len(body)) if fault.length is None else fault.length)
        request.send_header("Connection", "close")
        request.end_headers()
        if fault.cut_after_bytes is not None:
            body = body[: fault.cut_after_bytes]
        try:
            self.sent_bytes[request.path] += len(body)  # before: the client may be done before this thread goes on
            request.wfile.write(body)
            while fault.endless:
                request.wfile.write(b"\0" * 65536)
                self.sent_bytes[request.path] += 65536
        except OSError:
            pass  # the client had enough: what an endless answer is for

    def _next_fault(self, path: str) -> Fault:
        for key, queue in self._faults.items():
            if queue and path.endswith(key):
                return queue[0] if queue[0].always else queue.popleft()
        return Fault()
