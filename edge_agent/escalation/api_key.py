"""The key of the site's server: read anew for every question, so that a rotated one is picked up, and never logged."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from edge_agent.errors import PermanentError

_MAX_BYTES = 4096
# What an HTTP header can carry; anything else would be quoted by the library's own error.
_KEY = re.compile(rb"[\x21-\x7e]+")


def read_api_key(path: Path) -> str:
    """The key in ``path``, without the line's end.

    Raises:
        PermanentError: ``escalation.key_file``: it cannot be read, others could read it, or it holds no key.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise PermanentError("escalation.key_file", f"{path} is no regular file")
            if stat.S_IMODE(found.st_mode) & _forbidden_bits(path):
                raise PermanentError("escalation.key_file", f"{path} can be read by others: chmod 600")
            content = os.read(fd, _MAX_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise PermanentError("escalation.key_file", f"cannot read {path}: {error.strerror}") from error
    key = content.rstrip(b"\r\n")
    if len(content) > _MAX_BYTES or not _KEY.fullmatch(key):
        raise PermanentError("escalation.key_file", f"{path} does not hold one line of printable ASCII without spaces")
    return key.decode("ascii")


def _forbidden_bits(path: Path) -> int:
    """Permission bits that a key's file must not have."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    # systemd lets the service's user read a credential by an access list, whose mask shows as the group's bits.
    is_credential = credentials is not None and path.is_relative_to(credentials)
    return 0o037 if is_credential else 0o077
