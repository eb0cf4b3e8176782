"""Adapter files as damage and malice make them, and matrices that a graph has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.errors import PermanentError
from edge_agent.runtime.adapter import adapter_feeds, read_adapter
from edge_agent.runtime.tensors import MAX_HEADER_BYTES

SHAPES: dict[str, list[Any]] = {"lora.0.A": [4, "r"], "lora.0.B": ["r", 6], "lora.1.A": [6, "s"], "lora.1.B": ["s", 4]}
NAMES = ("lora.0", "lora.1")


def entry(begin: int, shape: list[Any], **changes: Any) -> dict[str, Any]:
    end = begin + 4 * int(np.prod([size for size in shape if isinstance(size, int)]))
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end], **changes}


def write(path: Path, header: Any, numbers: int = 20, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = np.arange(numbers, dtype="<f4").tobytes()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


GOOD = {"lora.0.A": entry(0, [4, 2]), "lora.0.B": entry(32, [2, 6])}


def test_matrices_come_back_as_they_were_written(tmp_path: Path) -> None:
    arrays = read_adapter(write(tmp_path / "a", {**GOOD, "__metadata__": {"format": "pt"}}))
    assert arrays["lora.0.A"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert arrays["lora.0.B"][1, 5] == 19


@pytest.mark.needs("module:safetensors")
def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    from safetensors import numpy as numpy_files

    arrays = {"b": np.ones((2, 3), np.float32), "a": np.zeros((5, 1), np.float32)}
    (tmp_path / "a").write_bytes(numpy_files.save(arrays))
    found = read_adapter(tmp_path / "a")
    assert {name: matrix.tolist() for name, matrix in found.items()} == {n: m.tolist() for n, m in arrays.items()}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(4, [4, 2]), "b": entry(36, [2, 6])},  # bytes before the first
        {"a": entry(0, [4, 2]), "b": entry(28, [2, 6])},  # overlap
        {"a": entry(0, [4, 2])},  # bytes after the last
        {"a": entry(0, [4, 2]), "b": entry(32, [200, 600])},  # beyond the end
        {"a": entry(0, [4, 2]), "b": {**entry(32, [2, 6]), "data_offsets": [32, 31]}},
        {"a": entry(0, [4, 2]), "b": {**entry(32, [2, 6]), "data_offsets": [32]}},
        {"a": entry(0, [4, 2]), "b": {**entry(32, [2, 6]), "data_offsets": [32.5, 80]}},
        {"a": entry(0, [4, 2]), "b": {**entry(32, [2, 6]), "data_offsets": ["x", 80]}},
        {"a": entry(0, [20])},
        {"a": entry(0, [2, 5, 2])},
        {"a": {**entry(0, [4, 5]), "shape": [-4, -5]}},
        {"a": {**entry(0, [4, 5]), "shape": [4.0, 5]}},
        {"a": {**entry(0, [4, 5]), "shape": [True, 20]}},
        {"a": {**entry(0, [4, 5]), "shape": [1 << 70, 1 << 70]}},
        {"a": entry(0, [4, 5], dtype="BF16")},
        {"a": {}},
        {"a": 3},
        [1, 2],
        "text",
        None,
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_header_that_lies_is_refused(header: Any, tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        read_adapter(write(tmp_path / "a", header))
    assert caught.value.code == "adapter.invalid"


@pytest.mark.parametrize("length", [0, MAX_HEADER_BYTES + 1, 1 << 63])
def test_a_header_of_a_wrong_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        read_adapter(write(tmp_path / "a", GOOD, length=length))
    assert caught.value.code == "adapter.invalid"


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_file_that_ends_early_is_refused(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a", GOOD)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PermanentError) as caught:
        read_adapter(path)
    assert caught.value.code == "adapter.invalid"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        read_adapter(tmp_path / "none")
    assert caught.value.code == "disk.missing"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a", GOOD)
    path.write_bytes(path.read_bytes()[:-4] + np.array([value], "<f4").tobytes())
    with pytest.raises(PermanentError, match="NaN or infinity"):
        read_adapter(path)


def test_what_a_task_does_not_change_has_rank_zero() -> None:
    down, up = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
    feeds = adapter_feeds(NAMES, SHAPES, {"lora.0.A": down, "lora.0.B": up})
    assert {name: matrix.shape for name, matrix in feeds.items()} == {
        "lora.0.A": (4, 2),
        "lora.0.B": (2, 6),
        "lora.1.A": (6, 0),
        "lora.1.B": (0, 4),
    }


@pytest.mark.parametrize(
    "arrays",
    [
        {"lora.0.A": np.ones((5, 2)), "lora.0.B": np.ones((2, 6))},
        {"lora.0.A": np.ones((4, 2)), "lora.0.B": np.ones((2, 7))},
        {"lora.0.A": np.ones((4, 2)), "lora.0.B": np.ones((3, 6))},
        {"lora.0.A": np.ones((4, 2))},
        {"lora.7.A": np.ones((4, 2)), "lora.7.B": np.ones((2, 6))},
    ],
    ids=["columns", "rows", "ranks", "half", "stranger"],
)
def test_matrices_that_the_graph_has_no_place_for_are_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(PermanentError) as caught:
        adapter_feeds(NAMES, SHAPES, arrays)
    assert caught.value.code == "adapter.invalid"
