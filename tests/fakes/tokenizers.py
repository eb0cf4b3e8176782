"""Small real tokenizers, trained on the spot: one that keeps pieces apart, and ones that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    '{"category":"thermal","severity":"high","action":"stop_all","escalate":true,"note":"pump leaks"}',
    "machine: press-4\ncode: E217\ntext: hydraulic pressure below setpoint for 12 s\nanswer: ",
    "Druck zu niedrig, Lager heiß, Störung 48 62 107 -3",
] * 3
SPECIAL = ["<|pad|>", "<|eos|>", "<|im_start|>"]


def byte_level(path: Path, *, splits_words: bool = True, vocabulary: int = 420) -> Path:
    """Byte-level BPE. With ``splits_words=False`` tokens may span quotes and letters (``":"t``)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits_words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _save(tokenizer, path)


def metaspace(path: Path) -> Path:
    """Puts a space in front of every piece, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _save(tokenizer, path)


def byte_fallback(path: Path, *, missing: frozenset[int] = frozenset()) -> Path:
    """SentencePiece as Gemma and Llama use it: whole words where it knows them, ``<0xNN>`` where it does not."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte not in missing)]
    words = ["therm", "al", "stop", "_all", "high", "low", "true", "false", "pump", "\u2581leaks", "hi", "gh"]
    letters = sorted(set('{}":,_0123456789abcdefghijklmnopqrstuvwxyz\u2581'))
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
    joined = [left + right for left, right in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *letters, *joined]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    return _save(tokenizer, path)


def lower_casing(path: Path) -> Path:
    """Cannot tell ``Low`` from ``low``."""
    spec = json.loads(byte_level(path).read_text())
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer = normalizers.Lowercase()
    return _save(tokenizer, path)


def with_plain_added_token(path: Path, content: str) -> Path:
    """An added token that the file does not even call special (as Qwen's ``<tool_call>``)."""
    spec: dict[str, Any] = json.loads(byte_level(path).read_text())
    largest = max(spec["model"]["vocab"].values())
    spec["added_tokens"].append(
        {"id": largest + 1, "content": content, "special": False, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
    )  # fmt: skip
    path.write_text(json.dumps(spec))
    return path


def _save(tokenizer: Any, path: Path) -> Path:
    tokenizer.save(str(path))
    return path
