"""Memory that a graph reads and writes, and how it is bound to a graph's inputs and outputs."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from typing import Any, Literal

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.runtime.library_errors import mapped


def untouched(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Zeros of which only what is written takes memory: rows and positions that are never used cost nothing."""
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Pages of 2 MB would bring in a whole layer of every row with the first position that is written.
    with contextlib.suppress(OSError):  # a kernel without such pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def bind(
    binding: Any, side: Literal["input", "output"], name: str, buffer: NDArray[Any], shape: tuple[int, ...]
) -> None:
    """Bind the beginning of a buffer of ordinary memory under ``name``."""
    bind_side = binding.bind_input if side == "input" else binding.bind_output
    bind_side(name, "cpu", 0, buffer.dtype.type, shape, buffer.ctypes.data)


def on_device(matrix: NDArray[Any], device: str) -> Any:
    """A matrix where the graph reads it."""
    return mapped("allocating memory", lambda: ort.OrtValue.ortvalue_from_numpy(matrix, device, 0))
