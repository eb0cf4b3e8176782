"""Does this tokenizer belong to this model, and can it say everything?

A tokenizer of another model loads without a word and makes a model answer noise. Nothing in either file names the
other, so what can be compared is: sizes, the end token, and whether text survives the way there and back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_agent.errors import PermanentError

MAX_SPARE_ROWS = 1024
MAX_SPARE_SHARE = 0.1
"""A model may have more rows than its tokenizer has tokens, to make a round number: published models up to 2 %."""

ROUND_TRIPS = (
    '{"kind":"stop","rank":12,"urgent":true}',
    "Temperatur zu hoch: 83,5 °C an Öfen 3-4",
    "!#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~",
    "line 1\nline  2",
)
"""Texts that must come back as they went in: JSON, another language, every printable character, two spaces."""


def check_tokenizer(file: Path, rows: int, eos_token_id: int) -> int | None:
    """Check a tokenizer against the model it lies beside.

    Args:
        file: ``tokenizer.json``.
        rows: rows of the model's embedding.
        eos_token_id: the model's end token.

    Returns:
        The id that the tokenizer puts before every text, if any.

    Raises:
        PermanentError: ``export.tokenizer_missing``, ``export.tokenizer_invalid``, ``export.vocab_mismatch``,
            ``export.tokenizer_mismatch`` or ``export.tokenizer_lossy``.
    """
    tokenizer = _read(file)
    _check_size(tokenizer, rows)
    ending = tokenizer.get_added_tokens_decoder().get(eos_token_id)
    if ending is None:
        found = tokenizer.id_to_token(eos_token_id)
        raise PermanentError(
            "export.tokenizer_mismatch",
            f"the model ends with token {eos_token_id}, which is {found!r} for the tokenizer and no control token: "
            "the two do not belong together",
            eos_token_id=eos_token_id,
        )
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if back != text:
            raise PermanentError(
                "export.tokenizer_lossy",
                f"the tokenizer makes {back!r} of {text!r}: answers would not be what is meant",
            )
    plain = tokenizer.encode("x", add_special_tokens=False).ids
    decorated = tokenizer.encode("x", add_special_tokens=True).ids
    return int(decorated[0]) if len(decorated) > len(plain) and decorated[1 : 1 + len(plain)] == plain else None


def tokens_beyond(file: Path, rows: int) -> list[str]:
    """Control tokens for which the model has no row.

    Gemma 3 below 4B has one: its tokenizer is shared with the models that see images. No text becomes a control
    token, so they may be left out.
    """
    return [str(token.get("content")) for token in _added_tokens(_spec(file)) if _is_beyond(token, rows)]


def fitted_tokenizer(file: Path, rows: int) -> bytes:
    """``tokenizer.json`` without the control tokens for which the model has no row.

    Raises:
        PermanentError: ``export.tokenizer_invalid``.
    """
    spec = _spec(file)
    spec["added_tokens"] = [token for token in _added_tokens(spec) if not _is_beyond(token, rows)]
    return json.dumps(spec, ensure_ascii=False).encode()


def _added_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = spec.get("added_tokens")
    return [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []


def _is_beyond(token: dict[str, Any], rows: int) -> bool:
    number = token.get("id")
    return isinstance(number, int) and number >= rows and token.get("special") is True


def _read(file: Path) -> Tokenizer:
    if not file.is_file():
        raise PermanentError(
            "export.tokenizer_missing", f"{file.name} is missing: only fast tokenizers can be exported"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a bad file
        raise PermanentError("export.tokenizer_invalid", f"{file.name}: {error}") from error
    # What was set for training would cut texts or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _spec(file: Path) -> dict[str, Any]:
    try:
        spec = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PermanentError("export.tokenizer_invalid", f"{file.name}: {error}") from error
    if not isinstance(spec, dict):
        raise PermanentError("export.tokenizer_invalid", f"{file.name} is not a JSON object")
    return spec


def _check_size(tokenizer: Tokenizer, rows: int) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= rows:
        raise PermanentError(
            "export.vocab_mismatch",
            f"the tokenizer's largest id is {largest}, but the model has {rows} rows",
            largest_id=largest,
            vocab_size=rows,
        )
    spare = rows - len(vocabulary)
    if spare > MAX_SPARE_ROWS and spare > MAX_SPARE_SHARE * rows:
        raise PermanentError(
            "export.vocab_mismatch",
            f"the tokenizer has {len(vocabulary)} tokens, but the model {rows} rows: it belongs to another model",
            largest_id=largest,
            vocab_size=rows,
        )
