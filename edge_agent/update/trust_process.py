"""The trust check in a child process, so that python-tuf's memory is given back after every look at the registry.

    python -m edge_agent.update.trust_process < request.json > answer.json

It also gives the check a deadline that nothing in it can ignore.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError, from_os_error

if TYPE_CHECKING:
    from edge_agent.update.trust import TrustedRelease

_POLL_S = 0.2
_TIMEOUT_S = 300.0
_KINDS: dict[str, type[EdgeError]] = {kind.kind: kind for kind in (TransientError, PermanentError, IntegrityError)}


class Request(BaseModel):
    """What the child is asked."""

    release: str
    registry_url: str
    trust_dir: Path
    state_dir: Path
    wall: datetime


class Answer(BaseModel):
    """What the child answers: a release or an error."""

    release: str = ""
    sha256: str = ""
    size: int = 0
    verified_at: datetime | None = None
    error: dict[str, str] | None = None


def find_release_in_child(request: Request, checkpoint: Callable[[], None]) -> TrustedRelease:
    """`trust.find_release`, in a process of its own.

    Args:
        request: the question.
        checkpoint: called several times a second; may raise to give up, which ends the child.

    Raises:
        EdgeError: as `trust.find_release`; TransientError ``trust.process_died``.
    """
    command = [sys.executable, "-P", "-m", "edge_agent.update.trust_process"]
    # -P: no module is taken from the folder in which the daemon happens to stand.
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True)
    except OSError as error:
        raise from_os_error(error, "starting the trust check") from error
    with child:
        try:
            raw = _converse(child, request.model_dump_json().encode(), checkpoint)
        finally:
            child.kill()
    return _read_answer(raw)


def _converse(child: subprocess.Popen[bytes], question: bytes, checkpoint: Callable[[], None]) -> bytes:
    waited_s = 0.0
    remaining: bytes | None = question
    while waited_s < _TIMEOUT_S:
        try:
            answer, _ = child.communicate(remaining, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            remaining = None
            waited_s += _POLL_S
            checkpoint()
        else:
            return answer
    raise TransientError("trust.registry_unreachable", f"no verified metadata within {_TIMEOUT_S:.0f} s")


def _read_answer(raw: bytes) -> TrustedRelease:
    from edge_agent.update.trust import TrustedRelease

    try:
        answer = Answer.model_validate_json(raw)
    except ValueError as error:
        raise TransientError("trust.process_died", "the trust check ended without an answer") from error
    if answer.error is not None:
        kind = _KINDS.get(answer.error.get("type", ""), PermanentError)
        raise kind(answer.error.get("code", "trust.process_died"), answer.error.get("detail", ""))
    if answer.verified_at is None:
        raise TransientError("trust.process_died", "the trust check gave half an answer")
    return TrustedRelease(answer.release, answer.sha256, answer.size, answer.verified_at)


def main() -> int:
    """The child: one request on stdin, one answer on stdout."""
    from edge_agent.update.transport import open_transport
    from edge_agent.update.trust import find_release

    try:
        request = Request.model_validate_json(sys.stdin.buffer.read())
        found = find_release(
            request.release,
            open_transport(request.registry_url),
            trust_dir=request.trust_dir,
            state_dir=request.state_dir,
            wall=request.wall,
        )
        answer = Answer(release=found.path, sha256=found.sha256, size=found.size, verified_at=found.verified_at)
    except EdgeError as error:
        answer = Answer(error={"code": error.code, "type": error.kind, "detail": error.detail})
    sys.stdout.write(answer.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
