"""The checkpoint as it arrives: checked completely before any graph is built, and never run.

A checkpoint is a directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``. What brings code of its own
is refused: Python files always, pickles unless the user vouches for them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import sha256_file
from export.checkpoint import weights
from export.checkpoint.pickles import convert_pickles, least_parameters, pickled_files
from export.checkpoint.tokenizer import check_tokenizer, fitted_tokenizer, tokens_beyond

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
SINGLE_NAME = weights.SINGLE_NAME
INDEX_NAME = weights.INDEX_NAME
MAX_PARAMETERS = 1_000_000_000
CODE_PATTERNS = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
"""How files are named that transformers would run for a model that it does not know."""

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
        return _eos_token_id(self.config)

    @property
    def sha256(self) -> str:
        """One digest over all files that the build reads: hex SHA-256 of the ``sha256sum`` listing in name order."""
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.file_hashes.items()))
        return hashlib.sha256(listing.encode()).hexdigest()


def open_checkpoint(
    path: Path, *, allow_large: bool = False, trust: bool = False, scratch: Path | None = None
) -> Checkpoint:
    """Check a checkpoint directory and describe it.

    Args:
        path: directory with config.json, weights and tokenizer.json.
        allow_large: whether more than `MAX_PARAMETERS` are welcome.
        trust: whether pickled weights are welcome. They are read by torch's weights-only reader, which makes tensors
            and calls nothing, and written to ``scratch`` as safetensors; code in a checkpoint stays refused.
        scratch: folder for a checkpoint that must be written anew before it can be used: pickles become safetensors,
            and control tokens for which the model has no row are left out of the tokenizer. Must outlive the result.

    Returns:
        The description; weights stay on disk. `Checkpoint.path` is below ``scratch`` where it was written anew, but
        `Checkpoint.file_hashes` are always those of the files in ``path``.

    Raises:
        PermanentError: ``export.checkpoint_missing``, ``export.config_invalid``, ``export.weights_missing``,
            ``export.index_invalid``, ``export.shard_missing``, ``export.weights_corrupt``, ``export.tensor_missing``,
            ``export.nan_weights``, ``export.pickle_invalid``, ``export.tokenizer_*``, ``export.vocab_mismatch``.
        RefusedError: ``export.architecture_unsupported``, ``export.remote_code_refused``,
            ``export.quantised_already``, ``export.pickle_refused``, ``export.too_large``.
    """
    config = _read_config(path)
    sources = weights.weight_files(path) or pickled_files(path, trust=trust)
    if not sources:
        raise PermanentError("export.weights_missing", f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    pickled = sources[0].suffix != ".safetensors"
    # Sizes come from headers and file sizes, so that a 70B checkpoint is refused before a weight of it is read.
    _check_size(least_parameters(sources) if pickled else weights.count_parameters(sources), allow_large=allow_large)
    rows = int(config["vocab_size"])
    tokenizer_file = path / TOKENIZER_NAME
    beyond = tokens_beyond(tokenizer_file, rows) if tokenizer_file.is_file() else []
    folder, files = path, sources
    if scratch is not None and (pickled or beyond):
        folder = scratch / "checkpoint"
        files = _write_anew(path, sources, folder, config)
    elif pickled:
        raise ValueError("a pickled checkpoint can only be opened with a scratch folder")
    parameters = weights.count_parameters(files)
    _check_size(parameters, allow_large=allow_large)
    eos_token_id = _eos_token_id(config)
    bos_token_id = check_tokenizer(folder / TOKENIZER_NAME, rows, eos_token_id)
    for file in files:
        weights.check_finite(file)
    hashes = {file.name: sha256_file(file) for file in (path / CONFIG_NAME, tokenizer_file, *sources)}
    return Checkpoint(folder, config, files, parameters, bos_token_id, hashes)


def _check_size(parameters: int, *, allow_large: bool) -> None:
    if parameters > MAX_PARAMETERS and not allow_large:
        raise RefusedError(
            "export.too_large",
            f"at least {parameters:,} parameters exceed {MAX_PARAMETERS:,}: such a model answers too slowly on the "
            "gateways this is for; --allow-large builds it all the same",
            parameters=parameters,
        )


def _write_anew(path: Path, sources: tuple[Path, ...], folder: Path, config: dict[str, Any]) -> tuple[Path, ...]:
    """The checkpoint in ``path`` as safetensors and with a tokenizer that fits; returns its weight files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(path / CONFIG_NAME, folder / CONFIG_NAME)
    if (path / TOKENIZER_NAME).is_file():
        fitted = fitted_tokenizer(path / TOKENIZER_NAME, int(config["vocab_size"]))
        (folder / TOKENIZER_NAME).write_bytes(fitted)
    if sources[0].suffix != ".safetensors":
        return (convert_pickles(sources, folder, tied=config.get("tie_word_embeddings") is True),)
    index = path / INDEX_NAME
    for file in [*sources, *([index] if index.is_file() else [])]:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    return tuple(folder / file.name for file in sources)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise PermanentError("export.checkpoint_missing", f"{path} holds no {CONFIG_NAME}", path=str(path))
    config = weights.read_json(file, "export.config_invalid")
    _refuse_code(path, config)
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise RefusedError("export.architecture_unsupported", f"architecture {architecture!r} is not one of: {known}")
    if config.get("quantization_config"):
        raise RefusedError(
            "export.quantised_already", "the checkpoint is quantised already: take the one that it was made from"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PermanentError(
                "export.config_invalid", f"config.json: {name} must be a positive integer, not {value!r}"
            )
    if _eos_token_id(config) >= config["vocab_size"]:
        raise PermanentError(
            "export.config_invalid", f"eos_token_id {config['eos_token_id']} is outside the vocabulary"
        )
    return config


def _refuse_code(path: Path, config: dict[str, Any]) -> None:
    found = sorted(file.name for pattern in CODE_PATTERNS for file in path.glob(pattern))
    if config.get("auto_map") or found:
        what = found[0] if found else f"auto_map in {CONFIG_NAME}"
        raise RefusedError(
            "export.remote_code_refused",
            f"the checkpoint brings code of its own ({what}), and what that computes cannot be known without running "
            "it: take a version of the model that needs no trust_remote_code",
        )


def _eos_token_id(config: dict[str, Any]) -> int:
    value = config.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise PermanentError("export.config_invalid", "config.json names no eos_token_id")
    return first
