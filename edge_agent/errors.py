"""The error tree. Every failure the product can name is one of these.

    EdgeError
    ├── TransientError   try again later: the network, a busy broker, a full disk that may drain
    ├── PermanentError   do not try again: report and stop this piece of work
    ├── IntegrityError   bytes are not what was signed: never retry, mark the artifact bad
    └── RefusedError     the request itself was wrong: say why, change nothing

Each error carries a stable ``code`` (``area.fault``). Codes appear in logs, in ``model/reported``, in
dead letters and in docs/errors.md; they are part of the contract and are never renamed, only added.
No library exception crosses a module's boundary unmapped.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class EdgeError(Exception):
    """Base of every error raised on purpose by edge-agent.

    Args:
        code: stable identifier, ``area.fault`` in lower case, e.g. ``bundle.file_missing``.
        detail: one sentence for a person; never contains a secret.
        context: further JSON-serialisable facts (paths, sizes in bytes, limits).
    """

    kind: ClassVar[str] = "error"

    def __init__(self, code: str, detail: str, **context: Any) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.context = context

    def as_dict(self) -> dict[str, Any]:
        """The form that travels in logs, MQTT payloads and dead letters."""
        return {"code": self.code, "type": self.kind, "detail": self.detail, **self.context}


class TransientError(EdgeError):
    """May succeed when tried again; the only kind that tenacity retries."""

    kind = "transient"


class PermanentError(EdgeError):
    """Will not succeed by trying again."""

    kind = "permanent"


class IntegrityError(EdgeError):
    """Bytes differ from what was signed. Never retried; the artifact is marked bad."""

    kind = "integrity"


class RefusedError(EdgeError):
    """The request was wrong. Nothing was changed."""

    kind = "refused"


# Full-disk conditions drain on their own (log rotation, outbox drain), so they are worth a retry.
_TRANSIENT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM})
_OS_CODES = {
    errno.ENOSPC: "disk.full",
    errno.EDQUOT: "disk.full",
    errno.EROFS: "disk.read_only",
    errno.EACCES: "disk.permission",
    errno.EPERM: "disk.permission",
    errno.ENOENT: "disk.missing",
    errno.EADDRINUSE: "net.port_in_use",
    errno.ECONNREFUSED: "net.refused",
}


def from_os_error(error: OSError, doing: str) -> EdgeError:
    """Map an ``OSError`` into the tree.

    Args:
        error: what the operating system said.
        doing: what was being done, for the sentence ("writing the outbox").

    Returns:
        A ``TransientError`` where time may cure it (full disk, refused connection), else a ``PermanentError``.
    """
    code = _OS_CODES.get(error.errno or 0, "os.error")
    detail = f"{doing}: {error.strerror or error}"
    context = {"path": str(error.filename)} if error.filename else {}
    transient = error.errno in _TRANSIENT_ERRNOS or isinstance(error, ConnectionError | TimeoutError)
    return (TransientError if transient else PermanentError)(code, detail, **context)
