"""A TCP proxy that makes the bad network: cuts, stalls, swallows.

The client connects to ``proxy.port``; the proxy connects to the real server. Faults apply to connections that are open
now and to those that come later, until they are lifted.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Literal

Direction = Literal["up", "down"]  # up: from the client to the server


class CutProxy:
    """One listening port in front of one server.

    Args:
        target_port: the server on 127.0.0.1; may be absent, then clients are hung up on.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.bytes_passed = {"up": 0, "down": 0}
        self._swallows: set[Direction] = set()
        self._refuses = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, direction: Direction) -> None:
        """Read and forget what goes this way: each side believes that the other has it."""
        self._swallows.add(direction)

    def cut(self) -> None:
        """Break every open connection at once, with a reset."""
        with self._lock:
            for sock in self._sockets:
                # SO_LINGER 0: close sends RST, as a crashed router would
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    sock.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Hang up on new connections, and cut the open ones."""
        self._refuses = True
        self.cut()

    def heal(self) -> None:
        """Lift all faults."""
        self._swallows.clear()
        self._refuses = False

    def close(self) -> None:
        """Stop listening and break everything."""
        self._refuses = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refuses:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), timeout=2)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._sockets |= {client, server}
            lanes = [
                threading.Thread(target=self._pass, args=(client, server, "up"), daemon=True),
                threading.Thread(target=self._pass, args=(server, client, "down"), daemon=True),
            ]
            for lane in lanes:
                lane.start()
            threading.Thread(target=self._forget, args=(client, server, lanes), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                if direction not in self._swallows:
                    target.sendall(chunk)
                    self.bytes_passed[direction] += len(chunk)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _forget(self, client: socket.socket, server: socket.socket, lanes: list[threading.Thread]) -> None:
        for lane in lanes:
            lane.join()
        with self._lock:
            self._sockets -= {client, server}
        client.close()
        server.close()


MakeProxy = Callable[[int], CutProxy]
