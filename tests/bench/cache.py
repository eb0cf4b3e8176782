"""``build/bench``: what is slow to make and always the same is made once for each content of its inputs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_agent.fs import sha256_file

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "bench"
_KEY_CHARS = 16


def cached(name: str, key: Mapping[str, Any], make: Callable[[Path], None], cache: Path = CACHE) -> Path:
    """A folder made by ``make`` for exactly this key.

    Args:
        name: what it holds; an older folder of the same name is removed when a new one is made.
        key: JSON; everything that the content depends on.
        make: fills the empty folder that it is given.
        cache: where such folders lie.

    Returns:
        ``cache/<name>-<digest of the key>``.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:_KEY_CHARS]
    folder = cache / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    partial = cache / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    for older in cache.glob(f"{name}-{'?' * _KEY_CHARS}"):
        shutil.rmtree(older)
    partial.rename(folder)
    return folder


def files_digest(*paths: Path) -> str:
    """SHA-256 over names and contents of files; folders count with every file below them."""
    listing = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            listing.update(f"{sha256_file(file)}  {file.relative_to(path.parent).as_posix()}\n".encode())
    return listing.hexdigest()


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions, for keys and for the page."""
    return {package: version(package) for package in packages}
