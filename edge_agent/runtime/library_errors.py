"""ONNX Runtime's errors as ours: which of them is a bad bundle, which a lack of memory, which a failed run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edge_agent.errors import EdgeError, IntegrityError, PermanentError

_LIBRARY_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in (
        "EPFail",
        "EngineError",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "ModelLoaded",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)
_MEMORY_WORDS = ("bad_alloc", "bad allocation", "failed to allocate", "out of memory", "cannot allocate memory")
_TERMINATED = "terminate flag"
_CORRUPT_WORDS = (
    "protobuf parsing failed",
    "external data",
    "external initializer",
    "out of bounds",
    "can not be read",
)


def mapped(doing: str, call: Callable[[], Any]) -> Any:
    """Call the library; what it raises comes out as `map_library_error` of it."""
    try:
        return call()
    except (*_LIBRARY_ERRORS, RuntimeError, MemoryError) as error:  # bound runs raise Python's own RuntimeError
        raise map_library_error(doing, error) from error


def map_library_error(doing: str, error: BaseException) -> EdgeError:
    """An ONNX Runtime error (or `MemoryError`) as one of ours.

    Args:
        doing: what was being done; "loading the model" distinguishes a bad bundle from a failed run.
        error: what the library raised.

    Returns:
        ``worker.out_of_memory``, ``bundle.file_missing``, ``bundle.file_corrupt``, ``bundle.unsupported``, or
        ``worker.deadline`` (see `pass_limit`) or ``worker.inference`` for a run.
    """
    text = str(error)
    lowered = text.lower()
    if _TERMINATED in lowered:
        return PermanentError("worker.deadline", f"deadline passed while {doing}")
    if isinstance(error, MemoryError) or any(word in lowered for word in _MEMORY_WORDS):
        return PermanentError("worker.out_of_memory", f"{doing}: {text or 'allocation failed'}")
    if doing != "loading the model":
        return PermanentError("worker.inference", f"{doing}: {text}")
    if isinstance(error, ort_errors.NoSuchFile):
        return IntegrityError("bundle.file_missing", f"{doing}: {text}")
    if isinstance(error, ort_errors.InvalidProtobuf) or any(word in lowered for word in _CORRUPT_WORDS):
        return IntegrityError("bundle.file_corrupt", f"{doing}: {text}")
    return PermanentError("bundle.unsupported", f"{doing}: {text}")
