"""The prefix's keys and values on disk, so that a restart does not compute them again.

A file holds one state: a line of JSON that says what it belongs to, then the numbers as they lie in memory, which are
mapped and copied into the cache. The state is derived from a verified bundle and is a cache, nothing more: whatever is
odd about a file (another model, another processor, another version, a torn write, a flipped bit) makes it unusable, and
the prefix is computed as if there were none. Its directory belongs to the agent's user alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_agent.errors import EdgeError
from edge_agent.fs import write_atomic
from edge_agent.runtime.kv_cache import MAX_PASS_TOKENS, KvSegment

MAX_HEADER_BYTES = 4096
MAX_FILES = 16
"""States that are kept; the oldest go first. Two slots with a few tasks each need fewer."""
_SUFFIX = ".prefix"


@dataclass(frozen=True)
class PrefixKey:
    """What a state belongs to.

    Args:
        bundle: digest of the bundle.
        task: its task.
        tokens: ids of the prefix.
        threads: intra-op threads: sums may be cut into other parts.
    """

    bundle: str
    task: str
    tokens: tuple[int, ...]
    threads: int

    def digest(self) -> str:
        """Of everything that the numbers depend on: the key, ONNX Runtime and its kernels, the kind of processor."""
        facts = [self.bundle, self.task, self.tokens, self.threads, ort.__version__, platform.machine(), _cpu_flags()]
        facts += [MAX_PASS_TOKENS, os.environ.get("ORT_GQA_DISABLE_FLASH_ATTENTION")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class PrefixStore:
    """States in a directory.

    Args:
        folder: where they lie; made when the first is saved. None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self, key: PrefixKey, shape: tuple[int, ...], dtype: Any) -> KvSegment | None:
        """Map a state.

        Args:
            key: what it must belong to.
            shape: that it must have, (2 * layers, kv_heads, tokens, head_dim).
            dtype: element type that it must have.

        Returns:
            A read-only map of the file; None when there is no usable one.
        """
        if self._folder is None:
            return None
        digest = key.digest()
        path = self._folder / f"{digest}{_SUFFIX}"
        try:
            with path.open("rb") as reader:
                line = reader.readline(MAX_HEADER_BYTES)
            header = json.loads(line)
            wanted = {"format": 1, "key": digest, "shape": list(shape), "dtype": np.dtype(dtype).str}
            if any(header.get(name) != value for name, value in wanted.items()):
                return None
            mapped: KvSegment = np.memmap(path, dtype, "r", offset=len(line), shape=shape)
            if path.stat().st_size != len(line) + mapped.nbytes or header.get("sha256") != _sha256(mapped):
                return None
        except (OSError, ValueError, AttributeError):
            return None
        return mapped

    def save(self, key: PrefixKey, segment: KvSegment) -> None:
        """Keep a state. A directory that cannot be written to is no fault: the next start computes the prefix again."""
        if self._folder is None:
            return
        digest = key.digest()
        header = {
            "format": 1,
            "key": digest,
            "shape": list(segment.shape),
            "dtype": segment.dtype.str,
            "sha256": _sha256(segment),
        }
        line = json.dumps(header).encode() + b"\n"
        # The numbers begin at a multiple of their own size.
        line = line[:-1] + b" " * (-len(line) % 64) + b"\n"
        with contextlib.suppress(OSError, EdgeError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self._folder / f"{digest}{_SUFFIX}", line + segment.tobytes(), mode=0o600)
            self._prune()

    def _prune(self) -> None:
        if self._folder is None:
            return
        files = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in files[MAX_FILES:]:
            old.unlink(missing_ok=True)


def _sha256(segment: KvSegment) -> str:
    return hashlib.sha256(np.ascontiguousarray(segment).data.cast("B")).hexdigest()


def _cpu_flags() -> str:
    """The processor's instructions: kernels are chosen by them, and other kernels round otherwise."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as reader:
            lines = (line for line in reader if line.lower().startswith(("flags", "features")))
            return next(lines, "").partition(":")[2].strip()
    except OSError:
        return ""
