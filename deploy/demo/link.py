"""The network between node and broker: a TCP relay that can be cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading

_CHUNK_BYTES = 1 << 16
_CUT_S = 5.0
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
        self._changed = threading.Condition()
        # One bell a relay: ringing it ends the relay.
        self._bells: set[socket.socket] = set()
        self._up = True
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
        """Reset every connection and let none through; when it returns, nothing passes any more."""
        with self._changed:
            self._up = False
            for bell in self._bells:
                with contextlib.suppress(OSError):
                    bell.send(b"!")
            self._changed.wait_for(lambda: not self._bells, _CUT_S)

    def restore(self) -> None:
        """Let new connections through."""
        self._up = True

    def close(self) -> None:
        """Stop listening, and cut."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(near,), name="link-relay", daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        ear, bell = socket.socketpair()
        with ear, bell:
            with near, contextlib.suppress(OSError):
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                if self._up:
                    self._relay_to_broker(near, ear, bell)
            with self._changed:
                self._bells.discard(bell)
                self._changed.notify_all()

    def _relay_to_broker(self, near: socket.socket, ear: socket.socket, bell: socket.socket) -> None:
        with socket.create_connection(self._broker, timeout=5) as far:
            far.settimeout(None)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            with self._changed:
                if not self._up:
                    return
                self._bells.add(bell)
            polite = _pump(near, far, ear)
            if polite:
                # What one side sent before it left must reach the other one.
                for side in (near, far):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def _pump(near: socket.socket, far: socket.socket, ear: socket.socket) -> bool:
    """Copy both ways until a side ends (True) or the bell rings (False)."""
    with selectors.DefaultSelector() as ready:
        ready.register(near, selectors.EVENT_READ, far)
        ready.register(far, selectors.EVENT_READ, near)
        ready.register(ear, selectors.EVENT_READ)
        while True:
            found = ready.select()
            if any(key.fileobj is ear for key, _ in found):
                return False
            for key, _ in found:
                source: socket.socket = key.fileobj  # type: ignore[assignment]
                chunk = source.recv(_CHUNK_BYTES)
                if not chunk:
                    return True
                key.data.sendall(chunk)
