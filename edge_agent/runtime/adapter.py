"""A task's LoRA adapter: what a few projections of the shared weights add for this task.

The graph has a branch ``y += (x @ A) @ B`` beside each adapted projection, and A and B are its inputs. So one session
and one set of weights serve every task of a bundle; a task without an adapter feeds matrices of rank 0, whose product
is zeros.

The file is safetensors (`tensors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.contract.manifest import ModelSpec
from edge_agent.errors import PermanentError, from_os_error
from edge_agent.runtime.tensors import Tensors, cut_tensors

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
    try:
        return _matrices(cut_tensors(np.frombuffer(content, np.uint8)))
    except ValueError as error:
        raise PermanentError("adapter.invalid", f"{path.name}: {error}", path=str(path)) from error


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


def _matrices(tensors: Tensors) -> Arrays:
    matrices: Arrays = {}
    for name, array in tensors.arrays.items():
        if array.ndim != 2 or array.dtype != np.dtype("<f4"):
            raise ValueError(f"{name!r} is no matrix of float32: {array.dtype} {array.shape}")
        # Copied, because the library reads aligned memory of the machine's own byte order.
        matrices[name] = array.astype(np.float32)
        if not np.isfinite(matrices[name]).all():
            raise ValueError(f"{name!r} holds NaN or infinity")
    return matrices
