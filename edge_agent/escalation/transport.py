"""One HTTP exchange with the site's server, bounded in time and bytes whatever the server does.

Redirects are refused: the question holds what the task shares and the server's key, and neither goes to a host that the
site did not name. Proxies are not used. The body of an error is not read: it may repeat the key.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_agent.errors import EdgeError, PermanentError, TransientError

MAX_REPLY_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0
_LATER = frozenset({408, 425})
_SECONDS = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer with status 200, 400 or 422; the latter two without their body."""

    status: int
    content: bytes


class Line:
    """Exchanges with one server. ``exchange`` may run on several threads at once.

    Args:
        base_url: ``https://host[:port]/path`` or ``http://…``, checked by the settings.
        ca_file: authorities that the server must be signed by; None takes the machine's.
    """

    def __init__(self, base_url: str, ca_file: Path | None) -> None:
        parts = urlsplit(base_url)
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._is_tls else 80)
        self._netloc = parts.netloc
        self._prefix = parts.path.rstrip("/")
        self._ca_file = ca_file
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_aborted = False

    def exchange(self, method: str, path: str, body: bytes | None, api_key: str | None, timeout_s: float) -> Reply:
        """Send one request and read its answer.

        Args:
            method: GET or POST.
            path: below the base URL.
            body: JSON.
            api_key: sent as a bearer token.
            timeout_s: for everything together, from the first packet to the last byte.

        Raises:
            TransientError: ``escalation.unreachable``, ``.no_answer``, ``.server_error`` or ``.busy``.
            PermanentError: ``escalation.denied``, ``.redirect_refused``, ``.http_error``, ``.tls_untrusted``,
                ``.ca_file`` or ``.reply_too_large``.
        """
        deadline_s = time.monotonic() + timeout_s
        # identity: a compressed answer could be unpacked without bound.
        headers = {"User-Agent": "edge-agent", "Accept": "application/json", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            with self._connected(deadline_s) as sock:
                connection = http.client.HTTPConnection(self._netloc)
                connection.sock = _Timed(sock, deadline_s)
                connection.request(method, f"{self._prefix}/{path}", body, headers)
                with contextlib.closing(connection.getresponse()) as response:
                    return _read(response)
        except ssl.SSLCertVerificationError as error:
            raise PermanentError("escalation.tls_untrusted", f"{self._netloc}: {error.verify_message}") from error
        except TimeoutError as error:
            raise TransientError("escalation.no_answer", f"{self._netloc}: no answer in time") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: not a host name
            # The class only: a library's own words may quote what was sent.
            detail = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise TransientError("escalation.unreachable", f"{self._netloc}: {detail}") from error

    def abort(self) -> None:
        """End every exchange, and refuse further ones."""
        with self._lock:
            self._is_aborted = True
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _connected(self, deadline_s: float) -> Iterator[socket.socket]:
        context = self._tls_context() if self._is_tls else None
        sock = socket.create_connection((self._host, self._port), min(CONNECT_TIMEOUT_S, _left_s(deadline_s)))
        with contextlib.ExitStack() as closing:
            if context is not None:
                # The handshake comes later, when `abort` can reach the socket: wrapping takes the descriptor over.
                sock = context.wrap_socket(sock, server_hostname=self._host, do_handshake_on_connect=False)
            closing.callback(sock.close)
            with self._lock:
                if self._is_aborted:
                    raise ConnectionAbortedError
                self._open.add(sock)
            closing.callback(self._forget, sock)
            sock.settimeout(_left_s(deadline_s))
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            yield sock

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)

    def _tls_context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise PermanentError("escalation.ca_file", f"{self._ca_file} cannot be used: {error.strerror}") from error


class _Timed:
    """A socket whose every wait ends at the same moment. A timeout of its own would begin anew with each byte."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock = sock
        self._deadline_s = deadline_s

    def sendall(self, data: Any) -> None:
        """Called by ``http.client``."""
        self._sock.settimeout(_left_s(self._deadline_s))
        self._sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Called by ``http.client``."""
        return io.BufferedReader(_Incoming(self._sock, self._deadline_s))

    def close(self) -> None:
        """Called by ``http.client``; the socket's owner closes it."""


class _Incoming(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock = sock
        self._deadline_s = deadline_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left_s(self._deadline_s))
        return self._sock.recv_into(buffer)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _read(response: http.client.HTTPResponse) -> Reply:
    if response.status in {400, 422}:
        return Reply(response.status, b"")
    if response.status != 200:
        raise _status_error(response)
    # One byte more than is taken; the length that a server announces is only its word.
    content = response.read(MAX_REPLY_BYTES + 1)
    if len(content) > MAX_REPLY_BYTES:
        raise PermanentError("escalation.reply_too_large", f"the reply exceeds {MAX_REPLY_BYTES} bytes")
    if response.length:
        raise http.client.IncompleteRead(content, response.length)
    return Reply(response.status, content)


def _status_error(response: http.client.HTTPResponse) -> EdgeError:
    status = response.status
    if status == 429 or (status == 503 and response.headers.get("Retry-After")):
        after = response.headers.get("Retry-After", "").strip()
        # A date would be held against this machine's clock, which may be wrong; then the usual pause will do.
        facts = {"retry_after_s": int(after)} if _SECONDS.fullmatch(after) else {}
        return TransientError("escalation.busy", f"HTTP {status}", status=status, **facts)
    if status >= 500 or status in _LATER:
        return TransientError("escalation.server_error", f"HTTP {status}", status=status)
    if 300 <= status < 400:
        return PermanentError(
            "escalation.redirect_refused", f"HTTP {status}; redirects are not followed", status=status
        )
    if status in {401, 403}:
        return PermanentError("escalation.denied", f"HTTP {status}: the server refuses this key", status=status)
    return PermanentError("escalation.http_error", f"HTTP {status}", status=status)
