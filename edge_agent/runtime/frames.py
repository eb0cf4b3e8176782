"""Messages between agent and worker: a length (4 bytes, big-endian), then that many bytes of one JSON object.

JSON rather than pickle: neither side can be made to run code by what the other sends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from typing import Any

from edge_agent.errors import (
    EdgeError,
    IntegrityError,
    PermanentError,
    RefusedError,
    TransientError,
    from_os_error,
)

MAX_FRAME_BYTES = 8 << 20
LAST_FAULTS = frozenset({"worker.out_of_memory", "worker.bad_logits", "worker.inference"})
"""After these the worker ends: nothing in its process is trusted with another event, neither its memory nor a device's
context. The agent starts the next one."""
_LENGTH = struct.Struct(">I")
_KINDS: dict[str, type[EdgeError]] = {
    cls.kind: cls for cls in (TransientError, PermanentError, IntegrityError, RefusedError)
}

Message = dict[str, Any]


class FrameTimeout(Exception):  # noqa: N818 - a signal between two modules of this package, never seen outside
    """Nothing complete arrived in time."""


class FrameChannel:
    """One end of the conversation.

    Args:
        sock: a connected stream socket, owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: Message, *, timeout_s: float | None = None) -> None:
        """Send one message.

        Raises:
            RefusedError: ``event.too_large`` when it exceeds `MAX_FRAME_BYTES`, ``event.bad_field`` when it holds
                something that JSON cannot express; nothing was sent.
            FrameTimeout: the other end does not read.
            EdgeError: the other end is gone (as mapped by `from_os_error`).
        """
        try:
            body = json.dumps(message).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise RefusedError("event.bad_field", f"event cannot be written as JSON: {error}") from error
        if len(body) > MAX_FRAME_BYTES:
            raise RefusedError("event.too_large", f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
        except TimeoutError as error:
            raise FrameTimeout from error
        except OSError as error:
            raise from_os_error(error, "writing to the other process") from error

    def receive(self, *, timeout_s: float | None = None) -> Message | None:
        """Wait for one message.

        Args:
            timeout_s: for the whole message; None waits for ever.

        Returns:
            The message, or None when the other end closed.

        Raises:
            FrameTimeout: it did not come in time.
            PermanentError: ``worker.protocol`` for a frame that is too long, torn or not a JSON object.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        head = self._read(_LENGTH.size, end_s)
        if not head:
            return None
        (size,) = _LENGTH.unpack(head) if len(head) == _LENGTH.size else (0,)
        if not 0 < size <= MAX_FRAME_BYTES:
            raise PermanentError("worker.protocol", f"frame of {size} bytes announced")
        body = self._read(size, end_s)
        if len(body) < size:
            raise PermanentError("worker.protocol", "the other process closed in the middle of a frame")
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise PermanentError("worker.protocol", f"frame is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise PermanentError("worker.protocol", "frame is not a JSON object")
        return message

    def close(self) -> None:
        """Close this end; a thread that waits in `receive` wakes up."""
        with contextlib.suppress(OSError):  # the other end is gone already: that is what was wanted
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int, end_s: float | None) -> bytes:
        """Exactly ``size`` bytes, or fewer when the other end closed."""
        chunks: list[bytes] = []
        missing = size
        while missing:
            left_s = None if end_s is None else end_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise FrameTimeout
            try:
                self._socket.settimeout(left_s)
                chunk = self._socket.recv(min(missing, 1 << 20))
            except TimeoutError as error:
                raise FrameTimeout from error
            except OSError:
                break  # reset by a peer that died: the same as an end
            if not chunk:
                break
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)


def error_message(error: EdgeError) -> Message:
    """An error as it travels."""
    context = {name: value for name, value in error.context.items() if isinstance(value, str | int | float | bool)}
    return {"kind": error.kind, "code": error.code, "detail": error.detail, "context": context}


def error_from(message: Message) -> EdgeError:
    """The error that the other process raised."""
    context = {k: v for k, v in dict(message.get("context") or {}).items() if k not in ("code", "detail")}
    cls = _KINDS.get(str(message.get("kind")), PermanentError)
    return cls(str(message.get("code")), str(message.get("detail")), **context)
