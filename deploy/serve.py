"""A small static HTTP server for the registry: byte ranges, no directory listing, nothing outside its root.

For a workshop, a test or a plant LAN; a bucket or any web server serves the same files. Devices verify everything end
to end, so this server is trusted with nothing.
"""

from __future__ import annotations

import http.server
import mimetypes
import os
import re
import socketserver
import sys
import threading
import urllib.parse
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from edge_agent.errors import PermanentError, from_os_error

_RANGE = re.compile(r"^bytes=(\d*)-(\d*)$")
_CHUNK_BYTES = 1 << 16
_IDLE_TIMEOUT_S = 30.0


def byte_range(header: str | None, size: int) -> range | None:
    """The bytes that a ``Range`` header asks for.

    Args:
        header: its value, e.g. ``bytes=100-``; None when absent.
        size: bytes of the whole file.

    Returns:
        Offsets to send; None for the whole file (absent, malformed and multi-part headers are ignored, as RFC 9110
        allows). An empty range means that it cannot be satisfied.

    Source: RFC 9110, section 14.
    """
    match = _RANGE.match(header.strip()) if header else None
    if match is None or match.group(1, 2) == ("", ""):
        return None
    first, last = match.group(1, 2)
    if not first:
        return range(max(0, size - int(last)), size)
    start = int(first)
    stop = min(size, int(last) + 1) if last else size
    if last and int(last) < start:
        return None
    return range(start, max(start, stop))


class RangeRequests(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of plain files below ``root``."""

    protocol_version = "HTTP/1.1"
    server_version = "edge-registry"
    sys_version = ""
    timeout = _IDLE_TIMEOUT_S

    def __init__(
        self, request: object, client_address: object, server: socketserver.BaseServer, *, root: Path, quiet: bool
    ) -> None:
        self._root = root
        self._quiet = quiet
        super().__init__(request, client_address, server)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Send a file or a part of it."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Send the header of `do_GET`."""
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """One line a request on stderr."""
        if not self._quiet:
            sys.stderr.write(f"{self.address_string()} {format % args}\n")

    def _answer(self, *, with_body: bool) -> None:
        path = self._resolve()
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            with path.open("rb") as reader:
                self._send(reader, path, with_body=with_body)
        except (FileNotFoundError, PermissionError):
            self.send_error(HTTPStatus.NOT_FOUND)
        except (ConnectionError, TimeoutError):
            # The client went away; it will resume with a range.
            self.close_connection = True

    def _send(self, reader: BinaryIO, path: Path, *, with_body: bool) -> None:
        stat = os.fstat(reader.fileno())
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
        condition = self.headers.get("If-Range")
        wanted = byte_range(self.headers.get("Range"), stat.st_size) if condition in (None, etag) else None
        if wanted is not None and not wanted:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{stat.st_size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = range(stat.st_size) if wanted is None else wanted
        self.send_response(HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {body.start}-{body.stop - 1}/{stat.st_size}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", mimetypes.guess_type(path.name)[0] or "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", formatdate(stat.st_mtime, usegmt=True))
        # Only timestamp.json changes in place; every other name carries a version or a hash.
        fixed = path.name != "timestamp.json"
        self.send_header("Cache-Control", "public, max-age=31536000, immutable" if fixed else "no-cache")
        self.end_headers()
        if with_body:
            self._copy(reader, body)

    def _copy(self, reader: BinaryIO, body: range) -> None:
        reader.seek(body.start)
        left = len(body)
        while left and (chunk := reader.read(min(left, _CHUNK_BYTES))):
            self.wfile.write(chunk)
            left -= len(chunk)
        if left:
            # Fewer bytes than promised: only closing tells the client so.
            self.close_connection = True

    def _resolve(self) -> Path | None:
        """The file that the URL names, or None: no dot files, no directories, nothing outside the root."""
        raw = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        parts = [part for part in raw.split("/") if part]
        if any(part.startswith(".") or "\x00" in part for part in parts):
            return None
        try:
            path = self._root.joinpath(*parts).resolve()
        except (OSError, ValueError):
            return None
        return path if path.is_relative_to(self._root) and path.is_file() else None


class RegistryServer(http.server.ThreadingHTTPServer):
    """Serves one directory; a thread a connection.

    Args:
        root: the registry directory.
        bind: address to listen on.
        port: 0 picks a free one.
        quiet: no access log.

    Raises:
        EdgeError: ``net.port_in_use`` and what else `from_os_error` maps; ``registry.missing``.
    """

    daemon_threads = True

    def __init__(self, root: Path, *, bind: str = "127.0.0.1", port: int = 0, quiet: bool = False) -> None:
        if not root.is_dir():
            raise PermanentError("registry.missing", f"no registry at {root}", path=str(root))
        try:
            super().__init__((bind, port), partial(RangeRequests, root=root.resolve(), quiet=quiet))
        except OSError as error:
            raise from_os_error(error, f"listening on {bind}:{port}") from error

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that hung up between two requests; it will resume. Anything else is a defect."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """Base URL, without a closing slash."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"

    def start(self) -> threading.Thread:
        """Serve in a daemon thread; `shutdown` and `server_close` end it."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        return thread
