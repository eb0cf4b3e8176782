"""Which bytes a token stands for, and which tokens stand for one byte: how any text is written with few tokens.

Two families of tokenizers can write every text: byte-level BPE, whose alphabet is the 256 bytes in disguise, and
tokenizers with byte fallback, which have a token ``<0xNN>`` for each byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from edge_agent.errors import PermanentError

_FALLBACK = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
# The bytes that occur in UTF-8: tokenizers may leave out the others.
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


class ByteSpelling:
    """The bytes of a tokenizer's tokens.

    Args:
        written: token id to its bytes; control tokens are not in it.
        single: byte to the token that stands for it alone.

    Raises:
        PermanentError: ``tokenizer.no_bytes`` when some byte of UTF-8 has no token of its own.
    """

    def __init__(self, written: Mapping[int, bytes], single: Mapping[int, int]) -> None:
        missing = sorted(_UTF8_BYTES - set(single))
        if missing:
            raise PermanentError(
                "tokenizer.no_bytes",
                f"the tokenizer has no token for {len(missing)} single bytes, such as 0x{missing[0]:02X}",
            )
        self._written = written
        self._single = single

    @property
    def byte_ids(self) -> frozenset[int]:
        """The tokens that stand for one byte each."""
        return frozenset(self._single.values())

    def id_of_byte(self, byte: int) -> int | None:
        """The token that stands for a byte; None for bytes that UTF-8 has no use for."""
        return self._single.get(byte)

    def bytes_of(self, token: int) -> bytes:
        """What a token writes; nothing for a control token."""
        return self._written.get(token, b"")

    def by_bytes(self, token: int) -> tuple[int, ...]:
        """The tokens that write the same, one byte each.

        Raises:
            PermanentError: ``tokenizer.no_bytes`` for a control token.
        """
        written = self.bytes_of(token)
        if not written:
            raise PermanentError("tokenizer.no_bytes", f"token {token} writes nothing that bytes could write")
        return tuple(self._single[byte] for byte in written)


def read_spelling(spec_json: str) -> ByteSpelling:
    """The spelling of a tokenizer.

    Args:
        spec_json: ``tokenizer.json`` in the Hugging Face format.

    Raises:
        PermanentError: ``tokenizer.no_bytes``.
    """
    spec: dict[str, Any] = json.loads(spec_json)
    vocabulary: dict[str, int] = _vocabulary(spec["model"])
    control = {int(added["id"]) for added in spec.get("added_tokens") or []}
    plain = {token: number for token, number in vocabulary.items() if number not in control}
    if has_step(spec, "ByteLevel"):
        alphabet = byte_level_alphabet()
        written = {
            number: bytes(alphabet[character] for character in token)
            for token, number in plain.items()
            if all(character in alphabet for character in token)
        }
        return ByteSpelling(written, {found[0]: number for number, found in written.items() if len(found) == 1})
    fallback = {token: int(found[1], 16) for token in vocabulary if (found := _FALLBACK.match(token))}
    # SentencePiece writes a space as a lower one eighth block.
    written = {number: token.replace("\u2581", " ").encode() for token, number in plain.items()}
    written |= {vocabulary[token]: bytes([byte]) for token, byte in fallback.items()}
    return ByteSpelling(written, {byte: vocabulary[token] for token, byte in fallback.items()})


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    listed: Any = model.get("vocab") or {}
    # Unigram models list [piece, score] in order of ids.
    return dict(listed) if isinstance(listed, dict) else {piece: number for number, (piece, _) in enumerate(listed)}


def has_step(spec: dict[str, Any], kind: str) -> bool:
    """Whether a tokenizer divides or joins text with a step of this kind."""
    for stage in ("pre_tokenizer", "decoder"):
        step = spec.get(stage) or {}
        inner = step.get("pretokenizers") or step.get("decoders") or []
        if any(part.get("type") == kind for part in [step, *inner]):
            return True
    return False


def byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte.

    Source: GPT-2's ``bytes_to_unicode``: printable Latin-1 as itself, the rest from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(rest)}
