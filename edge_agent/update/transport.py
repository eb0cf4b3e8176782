"""How bytes come from the registry: https, http and file behind one method. Nothing here decides what is trusted.

Redirects are refused: a registry is plain files under one base URL, and following a redirect would let whoever can
answer for it choose another host or drop TLS. Proxies are not used.
"""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import quote, unquote, urlsplit

from edge_agent.errors import EdgeError, PermanentError, TransientError, from_os_error

READ_BYTES = 64 << 10
_USER_AGENT = "edge-agent"
# No file is longer than 18 digits say; a server that sends thousands would stop the conversion with an error.
_CONTENT_RANGE = re.compile(r"^bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)$")
_LENGTH = re.compile(r"^[0-9]{1,18}$")
_LATER = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Stream:
    """An open download.

    Args:
        start: position of the first byte that will come: the asked one, or 0 where the server ignores ranges.
        size: size of the whole file in bytes, None when the source does not say.
        chunks: the bytes from ``start``; raises `TransientError` when the connection breaks.
    """

    start: int
    size: int | None
    chunks: Iterator[bytes]


class Transport(Protocol):
    """A place that serves files by relative path."""

    def open(self, path: str, *, offset: int = 0) -> AbstractContextManager[Stream]:
        """Open a file from ``offset`` on.

        Raises:
            PermanentError: ``fetch.not_found``, ``fetch.denied``, ``fetch.redirect_refused``, ``fetch.http_error``.
            TransientError: ``fetch.unreachable``, ``fetch.server_error``.
        """
        ...


def open_transport(base_url: str, *, timeout_s: float = 30.0) -> Transport:
    """The transport for a registry's base URL.

    Args:
        base_url: ``https://…``, ``http://…`` or ``file:///…``.
        timeout_s: silence on the line after which a connection counts as broken.

    Raises:
        PermanentError: ``fetch.bad_url``.
    """
    try:
        parts = urlsplit(base_url)
        _ = parts.port
    except ValueError as error:
        raise PermanentError("fetch.bad_url", f"the registry URL is malformed: {error}") from error
    if parts.scheme == "file":
        if parts.netloc not in {"", "localhost"} or not parts.path:
            raise PermanentError("fetch.bad_url", f"{base_url!r} is not file:///absolute/path")
        return FileTransport(Path(unquote(parts.path)))
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.username:
        raise PermanentError("fetch.bad_url", "the registry URL must be http(s)://host[:port]/path without credentials")
    return HttpTransport(parts.scheme, parts.netloc, parts.path.rstrip("/"), timeout_s)


class FileTransport:
    """A directory: a USB stick, a mounted share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def open(self, path: str, *, offset: int = 0) -> Iterator[Stream]:
        """See `Transport`."""
        if not self._root.is_dir():
            raise TransientError("fetch.unreachable", f"{self._root} is not there (stick not plugged in?)")
        try:
            reader = (self._root / path).open("rb")
        except FileNotFoundError as error:
            raise PermanentError("fetch.not_found", f"registry has no {path}", path=path) from error
        except OSError as error:
            raise from_os_error(error, f"opening {path}") from error
        with reader:
            size = reader.seek(0, 2)
            start = min(offset, size)
            reader.seek(start)
            yield Stream(start, size, _file_chunks(reader, path))


def _file_chunks(reader: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        while chunk := reader.read(READ_BYTES):
            yield chunk
    except OSError as error:  # a stick pulled out, a bad sector
        raise TransientError("fetch.interrupted", f"{path}: {error.strerror}", path=path) from error


class HttpTransport:
    """One request per file over ``http.client``: what a static file server needs, without another library."""

    def __init__(self, scheme: str, netloc: str, prefix: str, timeout_s: float) -> None:
        self._scheme = scheme
        self._netloc = netloc
        self._prefix = prefix
        self._timeout_s = timeout_s

    @contextmanager
    def open(self, path: str, *, offset: int = 0) -> Iterator[Stream]:
        """See `Transport`."""
        with closing(self._connect()) as connection, closing(self._request(connection, path, offset)) as response:
            start = _start_of(response, offset, path)
            yield Stream(start, _size_of(response, start), _http_chunks(response, path))

    def _connect(self) -> http.client.HTTPConnection:
        if self._scheme == "https":
            return http.client.HTTPSConnection(
                self._netloc, timeout=self._timeout_s, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self._netloc, timeout=self._timeout_s)

    def _request(self, connection: http.client.HTTPConnection, path: str, offset: int) -> http.client.HTTPResponse:
        # identity: a compressed answer could be unpacked without bound, and would not match the range.
        headers = {"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            connection.request("GET", f"{self._prefix}/{quote(path)}", headers=headers)
            response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise PermanentError("fetch.tls_untrusted", f"{self._netloc}: {error.verify_message}") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: not a host name
            raise TransientError(
                "fetch.unreachable", f"{self._netloc}: {str(error) or type(error).__name__}"
            ) from error
        if response.status not in {200, 206, 416}:
            response.close()
            raise _status_error(response.status, path)
        return response


def _status_error(status: int, path: str) -> EdgeError:
    facts = {"path": path, "status": status}
    if status >= 500 or status in _LATER:
        return TransientError("fetch.server_error", f"{path}: HTTP {status}", **facts)
    if 300 <= status < 400:
        return PermanentError("fetch.redirect_refused", f"{path}: HTTP {status}; redirects are not followed", **facts)
    if status in {404, 410}:
        return PermanentError("fetch.not_found", f"registry has no {path}", **facts)
    if status in {401, 403}:
        return PermanentError("fetch.denied", f"{path}: HTTP {status}", **facts)
    return PermanentError("fetch.http_error", f"{path}: HTTP {status}", **facts)


def _start_of(response: http.client.HTTPResponse, offset: int, path: str) -> int:
    if response.status == 200:
        return 0  # the server ignores ranges, or none was asked
    if response.status == 416:
        # Nothing at this offset: what lies here is not a beginning of the registry's file.
        raise TransientError("fetch.range_refused", f"{path}: nothing at byte {offset}", path=path, offset=offset)
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != offset:
        raise TransientError("fetch.range_refused", f"{path}: asked from byte {offset}, got another range", path=path)
    return offset


def _size_of(response: http.client.HTTPResponse, start: int) -> int | None:
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if response.status == 206 and match is not None:
        return int(match[3]) if match[3].isdigit() else None
    length = response.headers.get("Content-Length", "")
    return start + int(length) if _LENGTH.match(length) else None


def _http_chunks(response: http.client.HTTPResponse, path: str) -> Iterator[bytes]:
    try:
        # read1: what has arrived, so that a slow line is seen as progress and a cap works in small steps
        while chunk := response.read1(READ_BYTES):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise TransientError("fetch.interrupted", f"{path}: {str(error) or type(error).__name__}", path=path) from error
