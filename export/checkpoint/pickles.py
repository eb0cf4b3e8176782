"""Old checkpoints come as pickles, and a pickle is a program. Read with trust only, and even then not as a program.

torch's weights-only reader rebuilds tensors and plain containers and refuses everything else, so a pickle that would
call a function fails instead. Trust is still asked for: a reader of hostile bytes is code, and code has faults.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edge_agent.errors import PermanentError, RefusedError
from export.checkpoint.weights import PICKLE_SUFFIXES, SINGLE_NAME, shards

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
_FULL_BYTES = 4
"""Bytes of the widest weight: a pickle of more than four times as many bytes as a limit has surely more weights."""


def pickled_files(path: Path, *, trust: bool) -> tuple[Path, ...]:
    """The pickles of a checkpoint that holds no safetensors; empty when there are none.

    Args:
        path: the checkpoint's folder.
        trust: whether the user vouches for where the files came from.

    Raises:
        RefusedError: ``export.pickle_refused`` without trust, or for names that no checkpoint of transformers has.
        PermanentError: ``export.index_invalid`` or ``export.shard_missing``.
    """
    found = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    named = (path / PICKLE_NAME).is_file() or (path / PICKLE_INDEX_NAME).is_file()
    if found and not trust:
        raise RefusedError(
            "export.pickle_refused",
            f"{found[0]} is a pickle, which can run code when it is opened: convert the checkpoint to safetensors, "
            "or say --trust if you know where it came from",
        )
    if found and not named:
        raise RefusedError(
            "export.pickle_refused", f"of pickles only {PICKLE_NAME} and its shards are read, not {found[0]}"
        )
    if (path / PICKLE_INDEX_NAME).is_file():
        return shards(path / PICKLE_INDEX_NAME, ".bin")
    return (path / PICKLE_NAME,) if named else ()


def least_parameters(files: tuple[Path, ...]) -> int:
    """A lower bound of the number of weights, without opening a file."""
    return sum(file.stat().st_size for file in files) // _FULL_BYTES


def convert_pickles(files: tuple[Path, ...], folder: Path, *, tied: bool) -> Path:
    """Write the weights of trusted pickles as one safetensors file.

    Args:
        files: pickles, each a dictionary from name to tensor.
        folder: receives ``model.safetensors``.
        tied: whether head and embedding are meant to be one tensor, so that the second name of it is left out.

    Returns:
        The file.

    Raises:
        PermanentError: ``export.pickle_invalid`` when a file holds anything but tensors, or is damaged.
    """
    weights: dict[str, torch.Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for file in files:
        for name, tensor in _read(file).items():
            # safetensors does not know two names for one memory.
            place = (tensor.untyped_storage().data_ptr(), tensor.shape)
            if place in places and tied:
                continue
            weights[name] = tensor.contiguous().clone() if place in places else tensor.contiguous()
            places.add(place)
    target = folder / SINGLE_NAME
    save_file(weights, target, metadata={"format": "pt"})
    return target


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        # The old format without a zip archive cannot be mapped.
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError, TypeError) as error:
        first, *_ = str(error).splitlines() or [""]
        raise PermanentError(
            "export.pickle_invalid", f"{file.name} holds more than plain weights, or is damaged: {first}"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise PermanentError("export.pickle_invalid", f"{file.name} is not a dictionary of weights")
    return {str(name): tensor for name, tensor in loaded.items()}
