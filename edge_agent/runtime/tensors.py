"""The safetensors format: the header's length, the header, the numbers.

The length is a uint64, the header JSON (name to dtype, shape and offsets), and everything little-endian. It is read
here in plain, because forty lines weigh less on a gateway than a library.

Source: safetensors, README, section *Format*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}


@dataclass(frozen=True)
class Tensors:
    """What a file holds.

    Args:
        arrays: name to numbers; views of the file's content.
        metadata: name to text.
    """

    arrays: dict[str, NDArray[Any]]
    metadata: dict[str, str]


def cut_tensors(content: NDArray[np.uint8]) -> Tensors:
    """Cut a file's content into its arrays.

    Args:
        content: the whole file, uint8 (bytes,); may be a map of it.

    Raises:
        ValueError: it is not such a file, or a byte of it belongs to no array or to two.
    """
    length = int.from_bytes(content[:_LENGTH_BYTES].tobytes(), "little")
    start = _LENGTH_BYTES + length
    if len(content) < _LENGTH_BYTES or length > MAX_HEADER_BYTES or start > len(content):
        raise ValueError("its header does not fit")
    try:
        header = json.loads(content[_LENGTH_BYTES:start].tobytes())
        metadata = {str(name): str(text) for name, text in header.pop(_METADATA, {}).items()}
        return Tensors(_arrays(header, content[start:]), metadata)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _arrays(header: Mapping[str, Any], numbers: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    # In order of their bytes, so that every byte belongs to exactly one array.
    entries = sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0]))
    arrays: dict[str, NDArray[Any]] = {}
    end = 0
    for name, entry in entries:
        shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name!r} is of {entry['dtype']!r} {entry['shape']!r}")
        dtype: np.dtype[Any] = _DTYPES[entry["dtype"]]
        if begin != end or stop - begin != dtype.itemsize * math.prod(shape) or stop > len(numbers):
            raise ValueError(f"the offsets of {name!r} are wrong")
        arrays[name], end = numbers[begin:stop].view(dtype).reshape(shape), stop
    if end != len(numbers):
        raise ValueError("bytes are left over behind the last array")
    return arrays
