"""A large tokenizer as a table that a device maps instead of reading (`edge_agent.runtime.token_table`).

Only for plain byte-level BPE, which most models below a billion weights use. It is written only after both have said
the same of every token's own text, of tokens side by side, and of every character there is.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from edge_agent.errors import PermanentError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.spelling import byte_level_alphabet, has_step, read_spelling
from edge_agent.runtime.token_table import FACTS, FORMAT, STEPS, TokenTable
from export.checkpoint.tokenizer import ROUND_TRIPS

FEWEST_TOKENS = 16_384
"""Below, the library reads a tokenizer in some 30 ms, into a few MB."""
_TOGETHER = 16
"""Tokens, or characters, whose texts are compared as one."""
_ODD_TEXTS = (
    *ROUND_TRIPS,
    "it's we'll I'M don't 12345678901234567890 ..!!?? <|im_end|>",
    "\t\r\n  a\n\n b   \x00\x1f\x7f",
    "",
    " ",
    "a" * 3000,
    "ab" * 2000,
)


class UnsuitableTokenizerError(Exception):
    """Why a tokenizer cannot be such a table."""


@lru_cache(maxsize=2)
def token_table(
    file: Path,
    sha256: str,  # noqa: ARG001 - by it a changed file is told from the one that was asked for before
    fewest_tokens: int = FEWEST_TOKENS,
) -> bytes:
    """The table of a tokenizer.

    Args:
        file: ``tokenizer.json``.
        sha256: its hash.
        fewest_tokens: for which a table is worth its bytes.

    Returns:
        The file's bytes.

    Raises:
        UnsuitableTokenizerError: with the reason.
    """
    text = file.read_text("utf-8")
    spec: dict[str, Any] = json.loads(text)
    _check_kind(spec, fewest_tokens)
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    control = sorted({int(added["id"]) for added in spec.get("added_tokens") or []})
    try:
        spelling = read_spelling(text)
    except PermanentError as error:
        raise UnsuitableTokenizerError(str(error)) from error
    tokens = max([*vocabulary.values(), *control]) + 1
    written = [spelling.bytes_of(token) for token in range(tokens)]
    alphabet = set(byte_level_alphabet())
    if any(not alphabet.issuperset(token) for token, number in vocabulary.items() if number not in control):
        raise UnsuitableTokenizerError("some tokens are no bytes")
    merges = _merges(spec["model"])
    pairs = np.array(sorted(merges), np.uint64)
    ranks, joined = (np.array([merges[pair][half] for pair in pairs.tolist()], np.uint32) for half in (0, 1))
    # One text, because the library writes several in any order, and equal input gives equal bytes.
    facts = {"format": FORMAT, "control": control, **{name: spec.get(name) for name in STEPS}}
    content = save(
        {
            "pairs": pairs,
            "ranks": ranks,
            "joined": joined,
            "ends": np.cumsum([len(one) for one in written]).astype(np.uint32),
            "text": np.frombuffer(b"".join(written), np.uint8),
        },
        {FACTS: json.dumps(facts, sort_keys=True)},
    )
    prove(content, file, tokens)
    return content


def _check_kind(spec: dict[str, Any], fewest_tokens: int) -> None:
    model, divide = spec["model"], spec.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or not has_step({"decoder": spec.get("decoder")}, "ByteLevel"):
        raise UnsuitableTokenizerError("it is no byte-level BPE")
    if (divide.get("pretokenizers") or [divide])[-1].get("type") != "ByteLevel":
        raise UnsuitableTokenizerError("its words are no bytes")
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if found := [name for name in odd if model.get(name)]:
        raise UnsuitableTokenizerError(f"it has {found[0]}")
    if len(model["vocab"]) < fewest_tokens:
        raise UnsuitableTokenizerError(f"it has fewer than {fewest_tokens:,} tokens")


def _merges(model: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """Of each pair, left << 32 | right, its rank and the token that it becomes."""
    vocabulary: dict[str, int] = model["vocab"]
    merges: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges[vocabulary[left] << 32 | vocabulary[right]] = (rank, vocabulary[left + right])
    return merges


def prove(content: bytes, file: Path, tokens: int) -> None:
    """Compare a table with the library.

    Args:
        content: of the table.
        file: ``tokenizer.json``.
        tokens: how many ids there are.

    Raises:
        UnsuitableTokenizerError: they are not of one mind.
    """
    library = TextEncoder(file, tokens)
    with tempfile.NamedTemporaryFile() as written:
        written.write(content)
        written.flush()
        table = TokenTable(Path(written.name))
        for text in _probes(table, tokens):
            if table.encode(text) != library.encode(text):
                raise UnsuitableTokenizerError(f"it divides {text[:40]!r} in a way of its own")


def _probes(table: TokenTable, tokens: int) -> Iterator[str]:
    yield from _ODD_TEXTS
    characters = map(chr, range(sys.maxunicode + 1))
    assigned = [character for character in characters if unicodedata.category(character) not in ("Cn", "Co", "Cs")]
    yield from ("".join(assigned[first : first + _TOGETHER]) for first in range(0, len(assigned), _TOGETHER))
    texts = [table.decode([token]) for token in range(tokens)]
    yield from (" ".join(texts[first : first + _TOGETHER]) for first in range(0, tokens, _TOGETHER))
    random.Random(0).shuffle(texts)  # noqa: S311 - which tokens stand side by side
    yield from ("".join(texts[first : first + _TOGETHER]) for first in range(0, tokens, _TOGETHER))
