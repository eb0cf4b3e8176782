"""The checkpoint as it arrives: checked completely before any graph is built, and never unpickled.

A checkpoint is a directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import sha256_file

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_PARAMETERS = 1_000_000_000
MAX_CONFIG_BYTES = 4 << 20

ARCHITECTURES = frozenset(
    {"ernie4_5", "exaone4", "gemma", "gemma3_text", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "starcoder2"}
)
"""``model_type`` values whose fused graph is held against transformers by a test. Others are refused, not guessed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Args:
        path: its directory.
        config: ``config.json`` as parsed.
        weight_files: the safetensors files, in name order.
        parameters: number of stored weights (a tied head counts once).
        bos_token_id: what the tokenizer itself puts before a text, None for nothing. The configuration is not asked:
            it often names a token that no text was ever trained with.
        file_hashes: SHA-256 of every file that the build reads, by name.
    """

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    parameters: int
    bos_token_id: int | None
    file_hashes: dict[str, str]

    @property
    def architecture(self) -> str:
        """``model_type`` of the configuration."""
        return str(self.config["model_type"])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    @property
    def max_positions(self) -> int:
        """Longest text in tokens that the model was made for."""
        return int(self.config["max_position_embeddings"])

    @property
    def eos_token_id(self) -> int:
        """The end token, the first where the configuration lists several."""
        found = _first_id(self.config.get("eos_token_id"))
        if found is None:
            raise PermanentError("export.config_invalid", "config.json names no eos_token_id")
        return found

    @property
    def sha256(self) -> str:
        """One digest over all files that the build reads: hex SHA-256 of the ``sha256sum`` listing in name order."""
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.file_hashes.items()))
        return hashlib.sha256(listing.encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint directory and describe it.

    Args:
        path: directory with config.json, safetensors weights and tokenizer.json.

    Returns:
        The description; weights stay on disk.

    Raises:
        PermanentError: ``export.checkpoint_missing``, ``export.config_invalid``, ``export.weights_missing``,
            ``export.index_invalid``, ``export.shard_missing``, ``export.weights_corrupt``, ``export.nan_weights``,
            ``export.tokenizer_missing``, ``export.tokenizer_invalid``, ``export.vocab_mismatch``.
        RefusedError: ``export.architecture_unsupported``, ``export.pickle_refused``, ``export.too_large``.
    """
    config = _read_config(path)
    weight_files = _weight_files(path)
    # Sizes come from the headers, so that a 70B checkpoint is refused before a byte of it is read.
    parameters = sum(_count_parameters(file) for file in weight_files)
    if parameters > MAX_PARAMETERS:
        raise RefusedError(
            "export.too_large", f"{parameters:,} parameters exceed {MAX_PARAMETERS:,}", parameters=parameters
        )
    bos_token_id = _check_tokenizer(path / TOKENIZER_NAME, int(config["vocab_size"]))
    for file in weight_files:
        _check_finite(file)
    names = [CONFIG_NAME, TOKENIZER_NAME, *(file.name for file in weight_files)]
    hashes = {name: sha256_file(path / name) for name in names}
    checkpoint = Checkpoint(path, config, weight_files, parameters, bos_token_id, hashes)
    if checkpoint.eos_token_id >= checkpoint.vocab_size:
        raise PermanentError(
            "export.config_invalid", f"eos_token_id {checkpoint.eos_token_id} is outside the vocabulary"
        )
    return checkpoint


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise PermanentError("export.checkpoint_missing", f"{path} holds no {CONFIG_NAME}", path=str(path))
    config = _read_json(file, "export.config_invalid")
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise RefusedError("export.architecture_unsupported", f"architecture {architecture!r} is not one of: {known}")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PermanentError(
                "export.config_invalid", f"config.json: {name} must be a positive integer, not {value!r}"
            )
    return config


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (path / INDEX_NAME).is_file():
        return _indexed_files(path)
    if (path / SINGLE_NAME).is_file():
        return (path / SINGLE_NAME,)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise RefusedError(
            "export.pickle_refused",
            f"{pickles[0]} is a pickle, which can run code when it is opened: convert the checkpoint to safetensors",
        )
    raise PermanentError("export.weights_missing", f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}")


def _indexed_files(path: Path) -> tuple[Path, ...]:
    weight_map = _read_json(path / INDEX_NAME, "export.index_invalid").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PermanentError("export.index_invalid", f"{INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if PurePath(name).suffix in PICKLE_SUFFIXES:
            raise RefusedError("export.pickle_refused", f"{INDEX_NAME} names {name}, which is a pickle")
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise PermanentError(
                "export.index_invalid", f"{INDEX_NAME} names {name!r}, which is not a shard of this folder"
            )
        if not (path / name).is_file():
            raise PermanentError("export.shard_missing", f"shard {name} of {len(names)} is not there", shard=name)
    return tuple(path / name for name in names)


def _count_parameters(file: Path) -> int:
    total = 0
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                count = 1
                for size in weights.get_slice(name).get_shape():
                    count *= size
                total += count
    except (SafetensorError, OSError) as error:
        raise PermanentError(
            "export.weights_corrupt", f"{file.name} is not a whole safetensors file: {error}"
        ) from error
    return total


def _check_finite(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                tensor = weights.get_tensor(name)
                # NaN and infinity survive a sum, and a sum needs no mask as large as the tensor.
                if tensor.is_floating_point() and not bool(tensor.double().sum().isfinite()):
                    raise PermanentError("export.nan_weights", f"{name} holds NaN or infinity", tensor=name)
    except SafetensorError as error:
        raise PermanentError("export.weights_corrupt", f"{file.name}: {error}") from error


def _check_tokenizer(file: Path, vocab_size: int) -> int | None:
    """Read the tokenizer and return the id that it puts before every text, if any."""
    if not file.is_file():
        raise PermanentError(
            "export.tokenizer_missing", f"{file.name} is missing: only fast tokenizers can be exported"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a bad file
        raise PermanentError("export.tokenizer_invalid", f"{file.name}: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    # A model may have more rows than the tokenizer has tokens (padding to a round number), never fewer.
    if largest >= vocab_size:
        raise PermanentError(
            "export.vocab_mismatch",
            f"the tokenizer's largest id is {largest}, but the model has {vocab_size} rows",
            largest_id=largest,
            vocab_size=vocab_size,
        )
    plain = tokenizer.encode("x", add_special_tokens=False).ids
    decorated = tokenizer.encode("x", add_special_tokens=True).ids
    return int(decorated[0]) if len(decorated) > len(plain) and decorated[1 : 1 + len(plain)] == plain else None


def _read_json(file: Path, code: str) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise PermanentError(code, f"{file.name} exceeds {MAX_CONFIG_BYTES} bytes")
        parsed = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PermanentError(code, f"{file.name}: {error}") from error
    if not isinstance(parsed, dict):
        raise PermanentError(code, f"{file.name} is not a JSON object")
    return parsed


def _first_id(value: Any) -> int | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) else None
