"""The network between node and broker: a TCP relay that can be cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading

_CHUNK_BYTES = 1 << 16
# Linger 0: closing sends a reset, as a dying link does, and not a polite end.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """Listens on a free loopback port and relays every connection to the broker while it is up.

    Args:
        host: the broker's address.
        port: the broker's port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._broker = (host, port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._up = True
        self._closed = False
        threading.Thread(target=self._accept, name="link", daemon=True).start()

    @property
    def port(self) -> int:
        """Where the node connects to."""
        port: int = self._server.getsockname()[1]
        return port

    @property
    def up(self) -> bool:
        """Whether bytes pass."""
        return self._up

    def cut(self) -> None:
        """Reset every connection and let none through."""
        with self._lock:
            self._up = False
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    connection.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """Let new connections through."""
        with self._lock:
            self._up = True

    def close(self) -> None:
        """Cut, and stop listening."""
        self._closed = True
        self.cut()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(near,), name="link-relay", daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            # Set first: whatever ends this connection, no polite end is sent.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            if self._up:
                self._relay_to_broker(near)

    def _relay_to_broker(self, near: socket.socket) -> None:
        with socket.create_connection(self._broker, timeout=5) as far:
            far.settimeout(None)
            with self._lock:
                if not self._up:
                    return
                self._open |= {near, far}
            try:
                _pump(near, far)
            finally:
                with self._lock:
                    self._open -= {near, far}


def _pump(near: socket.socket, far: socket.socket) -> None:
    """Copy both ways until either side ends."""
    with selectors.DefaultSelector() as ready:
        ready.register(near, selectors.EVENT_READ, far)
        ready.register(far, selectors.EVENT_READ, near)
        while True:
            for key, _ in ready.select():
                source: socket.socket = key.fileobj  # type: ignore[assignment]
                chunk = source.recv(_CHUNK_BYTES)
                if not chunk:
                    return
                key.data.sendall(chunk)
