"""A task's LoRA adapter: what a few projections of the shared weights add for this task.

The graph has a branch ``y += (x @ A) @ B`` beside each adapted projection, and A and B are its inputs. So one session
and one set of weights serve every task of a bundle; a task without an adapter feeds matrices of rank 0, whose product
is zeros.

The file is safetensors: the header's length (uint64), the header (JSON: name to dtype, shape and offsets), the numbers.
Everything is little-endian. It is read here in plain, because forty lines weigh less on a gateway than a library.

Source: safetensors, README, section *Format*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.contract.manifest import ModelSpec
from edge_agent.errors import PermanentError, from_os_error

MAX_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8
_DTYPE = "F32"

Arrays = dict[str, NDArray[np.float32]]
"""Input name to matrix: ``<projection>.A`` float32 (columns, rank), ``<projection>.B`` float32 (rank, rows)."""


def task_adapter(folder: Path, model: ModelSpec, task: str) -> Arrays:
    """The matrices of a task; none where it has no adapter.

    Args:
        folder: a verified bundle's directory, or where an exporter laid a model out in the same way.
        model: names the file.
        task: the task.

    Raises:
        PermanentError: ``adapter.invalid``.
    """
    file = (model.adapters or {}).get(task)
    return {} if file is None else read_adapter(folder / file)


def read_adapter(path: Path) -> Arrays:
    """Read an adapter file whose hash has been verified; its content is checked all the same.

    Raises:
        PermanentError: ``adapter.invalid``, or ``disk.*`` when it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(content) < _LENGTH_BYTES or length > MAX_HEADER_BYTES or start > len(content):
        raise _invalid(path, "its header does not fit")
    try:
        return _matrices(json.loads(content[_LENGTH_BYTES:start]), content, start)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise _invalid(path, str(error)) from error


def adapter_feeds(names: Sequence[str], shapes: Mapping[str, Sequence[Any]], arrays: Arrays) -> Arrays:
    """Every adapter input of a graph, with rank 0 where the task adds nothing.

    Args:
        names: the graph's adapted projections, `ModelSpec.adapter_inputs`.
        shapes: of the graph's inputs, by name.
        arrays: of `read_adapter`; may cover a part of the projections.

    Raises:
        PermanentError: ``adapter.invalid`` for matrices that the graph has no place for.
    """
    feeds: Arrays = {}
    for name in names:
        columns, rows = int(shapes[f"{name}.A"][0]), int(shapes[f"{name}.B"][1])
        down = arrays.get(f"{name}.A", np.zeros((columns, 0), np.float32))
        up = arrays.get(f"{name}.B", np.zeros((0, rows), np.float32))
        if down.shape[0] != columns or up.shape[1] != rows or down.shape[1] != up.shape[0]:
            raise PermanentError(
                "adapter.invalid", f"{name} takes ({columns}, r) and (r, {rows}), not {down.shape} and {up.shape}"
            )
        feeds |= {f"{name}.A": down, f"{name}.B": up}
    unknown = sorted(arrays.keys() - feeds.keys())
    if unknown:
        raise PermanentError("adapter.invalid", f"the graph has no input {unknown[0]}")
    return feeds


def _matrices(header: Mapping[str, Any], content: bytes, start: int) -> Arrays:
    """Cut ``content`` from ``start`` on as the header says; raises what unexpected JSON raises."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    # In order of their bytes, so that every byte belongs to exactly one matrix.
    entries.sort(key=lambda item: int(item[1]["data_offsets"][0]))
    arrays: Arrays = {}
    end = 0
    for name, entry in entries:
        shape, (begin, stop) = _shape(entry), entry["data_offsets"]
        if begin != end or stop - begin != 4 * math.prod(shape) or start + stop > len(content):
            raise ValueError(f"the offsets of {name!r} are wrong")
        # Copied, because the library reads aligned memory of the machine's own byte order.
        matrix = np.frombuffer(content, "<f4", math.prod(shape), start + begin).reshape(shape).astype(np.float32)
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name!r} holds NaN or infinity")
        arrays[name], end = matrix, stop
    if start + end != len(content):
        raise ValueError("bytes are left over behind the last matrix")
    return arrays


def _shape(entry: Mapping[str, Any]) -> tuple[int, int]:
    rows, columns = entry["shape"]
    if entry["dtype"] != _DTYPE or not all(type(size) is int and size >= 0 for size in (rows, columns)):
        raise ValueError(f"not a matrix of {_DTYPE}: {entry['dtype']!r} {entry['shape']!r}")
    return rows, columns


def _invalid(path: Path, reason: str) -> PermanentError:
    return PermanentError("adapter.invalid", f"{path.name}: {reason}", path=str(path))
