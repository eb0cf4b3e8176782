"""A prefix's state is used where it is exactly what was saved, and computed anew in every other case."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.runtime.prefix_store import MAX_FILES, PrefixKey, PrefixStore

KEY = PrefixKey("d" * 64, "triage", (1, 2, 3), 2)
STATE = np.arange(2 * 1 * 3 * 4, dtype=np.float32).reshape(2, 1, 3, 4)


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    found = PrefixStore(tmp_path / "prefixes")
    found.save(KEY, STATE)
    return found


def load(store: PrefixStore, key: PrefixKey = KEY) -> np.ndarray | None:
    return store.load(key, STATE.shape, np.float32)


def the_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "prefixes").iterdir()
    return file


def test_what_was_saved_is_mapped(store: PrefixStore) -> None:
    found = load(store)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, STATE)


def test_only_the_agent_s_user_can_read_it(store: PrefixStore, tmp_path: Path) -> None:
    assert the_file(tmp_path).stat().st_mode & 0o077 == 0
    assert (tmp_path / "prefixes").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "other",
    [
        PrefixKey("e" * 64, "triage", (1, 2, 3), 2),
        PrefixKey("d" * 64, "sort", (1, 2, 3), 2),
        PrefixKey("d" * 64, "triage", (1, 2, 4), 2),
        PrefixKey("d" * 64, "triage", (1, 2, 3), 4),
    ],
    ids=["bundle", "task", "tokens", "threads"],
)
def test_state_of_something_else_is_not_used(store: PrefixStore, other: PrefixKey) -> None:
    assert load(store, other) is None


def test_state_of_another_shape_or_type_is_not_used(store: PrefixStore) -> None:
    assert store.load(KEY, (2, 1, 4, 3), np.float32) is None
    assert store.load(KEY, STATE.shape, np.int8) is None


def cut(raw: bytes) -> bytes:
    return raw[:-1]


def lengthen(raw: bytes) -> bytes:
    return raw + b"\0"


def flip(raw: bytes) -> bytes:
    return raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]


def rename(raw: bytes) -> bytes:
    return raw.replace(b'"key": "', b'"key": "0', 1)


@pytest.mark.parametrize(
    "damage", [cut, lengthen, flip, rename, lambda _: b"", lambda _: b"[]\n", lambda _: b"\xff" * 99]
)
def test_damaged_file_is_not_used(store: PrefixStore, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = the_file(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert load(store) is None
    store.save(KEY, STATE)
    assert load(store) is not None, "and is replaced by the next"


def test_directory_that_cannot_be_made_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = PrefixStore(tmp_path / "file" / "prefixes")
    store.save(KEY, STATE)
    assert load(store) is None


def test_no_directory_keeps_nothing(tmp_path: Path) -> None:
    store = PrefixStore(None)
    store.save(KEY, STATE)
    assert load(store) is None
    assert list(tmp_path.iterdir()) == []


def test_old_states_make_room(store: PrefixStore, tmp_path: Path) -> None:
    os.utime(the_file(tmp_path), (1, 1))
    for task in range(MAX_FILES):
        store.save(PrefixKey("d" * 64, f"t{task}", (1,), 2), STATE)
    assert len(list((tmp_path / "prefixes").iterdir())) == MAX_FILES
    assert load(store) is None
