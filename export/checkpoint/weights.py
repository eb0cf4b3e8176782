"""The weights of a checkpoint on disk: which files, how many numbers, and whether all of them are numbers.

Only headers are read until the size is known; no pickle is ever opened here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edge_agent.errors import PermanentError, RefusedError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_JSON_BYTES = 4 << 20


def weight_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, in name order; empty when there are none.

    Raises:
        PermanentError: ``export.index_invalid`` or ``export.shard_missing``.
        RefusedError: ``export.pickle_refused`` when the index names pickles.
    """
    if (path / INDEX_NAME).is_file():
        return shards(path / INDEX_NAME, ".safetensors")
    if (path / SINGLE_NAME).is_file():
        return (path / SINGLE_NAME,)
    lone = sorted(path.glob("model-*-of-*.safetensors"))
    if lone:
        raise PermanentError("export.index_invalid", f"{lone[0].name} is a shard, but {INDEX_NAME} is missing")
    return ()


def shards(index: Path, suffix: str) -> tuple[Path, ...]:
    """The files that an index names, in name order; all of them are there.

    Args:
        index: file with a ``weight_map`` from tensor to file name.
        suffix: what each name must end in.

    Raises:
        PermanentError: ``export.index_invalid`` or ``export.shard_missing``.
        RefusedError: ``export.pickle_refused``.
    """
    names = sorted({str(name) for name in _weight_map(index).values()})
    for name in names:
        if suffix not in PICKLE_SUFFIXES and PurePath(name).suffix in PICKLE_SUFFIXES:
            raise RefusedError("export.pickle_refused", f"{index.name} names {name}, which is a pickle")
        if PurePath(name).name != name or not name.endswith(suffix):
            raise PermanentError(
                "export.index_invalid", f"{index.name} names {name!r}, which is not a shard of this folder"
            )
        if not (index.parent / name).is_file():
            raise PermanentError("export.shard_missing", f"shard {name} of {len(names)} is not there", shard=name)
    return tuple(index.parent / name for name in names)


def count_parameters(files: tuple[Path, ...]) -> int:
    """Numbers in all files, read off the headers: a 70B checkpoint is measured in milliseconds.

    Raises:
        PermanentError: ``export.weights_corrupt``, or ``export.tensor_missing`` when the index promises a tensor that
            its shard does not hold.
    """
    shapes = {file.name: _shapes(file) for file in files}
    index = files[0].parent / INDEX_NAME
    if index.is_file():
        for tensor, name in _weight_map(index).items():
            if tensor not in shapes[str(name)]:
                raise PermanentError("export.tensor_missing", f"{name} lacks {tensor}", tensors=[tensor])
    return sum(math.prod(shape) for found in shapes.values() for shape in found.values())


def tensor_shapes(files: tuple[Path, ...]) -> dict[str, list[int]]:
    """Shape of every weight by name, read off the headers.

    Raises:
        PermanentError: ``export.weights_corrupt``.
    """
    return {name: shape for file in files for name, shape in _shapes(file).items()}


def check_finite(file: Path) -> None:
    """Read every weight once.

    Raises:
        PermanentError: ``export.nan_weights`` or ``export.weights_corrupt``.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                tensor = weights.get_tensor(name)
                # NaN and infinity survive a sum, and a sum needs no mask as large as the tensor.
                if tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.float64).isfinite()):
                    raise PermanentError("export.nan_weights", f"{name} holds NaN or infinity", tensor=name)
    except SafetensorError as error:
        raise PermanentError("export.weights_corrupt", f"{file.name}: {error}") from error


def read_json(file: Path, code: str) -> dict[str, Any]:
    """Parse a JSON object of bounded size.

    Raises:
        PermanentError: ``code``.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise PermanentError(code, f"{file.name} exceeds {MAX_JSON_BYTES} bytes")
        parsed = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PermanentError(code, f"{file.name}: {error}") from error
    if not isinstance(parsed, dict):
        raise PermanentError(code, f"{file.name} is not a JSON object")
    return parsed


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index, "export.index_invalid").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PermanentError("export.index_invalid", f"{index.name} has no weight_map")
    return weight_map


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise PermanentError(
            "export.weights_corrupt", f"{file.name} is not a whole safetensors file: {error}"
        ) from error
