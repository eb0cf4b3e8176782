"""The hashes of an installed bundle's files, begun before anything else is imported: a start waits longest for them.

Imports nothing that takes long, and decides nothing: whether a hash is the right one is asked in `bundle`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from edge_agent.errors import EdgeError
from edge_agent.fs import sha256_file

_MANIFEST_NAME = "manifest.json"


def hash_listed(bundle: Path, expected_digest: str) -> dict[str, str]:
    """Hash what a bundle's manifest lists.

    Args:
        bundle: its directory.
        expected_digest: hex SHA-256 that the manifest must have; no other manifest is even parsed.

    Returns:
        Path inside the bundle to hex SHA-256. What cannot be hashed is left out, for `open_installed_bundle` to name.
    """
    with contextlib.suppress(OSError):
        manifest_bytes = (bundle / _MANIFEST_NAME).read_bytes()
        if hashlib.sha256(manifest_bytes).hexdigest() == expected_digest:
            return dict(_hashes(bundle, manifest_bytes))
    return {}


def _hashes(bundle: Path, manifest_bytes: bytes) -> Iterator[tuple[str, str]]:
    for entry in json.loads(manifest_bytes)["files"]:
        with contextlib.suppress(EdgeError):
            yield entry["path"], sha256_file(bundle / entry["path"])
