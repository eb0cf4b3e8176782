"""The reference model's tokenizer: byte-level BPE whose tokens never cross from punctuation into letters.

That property makes tokenisation safe to concatenate: prefix, rendered event and answer are encoded apart, both in
training and on the device, and after the forced ``":"`` every enum value is exactly one token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|eos|>"
PAD = "<|pad|>"
VOCABULARY_SIZE = 4096
# Words with the space before them, single digits, line ends alone, punctuation runs, other white space.
PATTERN = r" ?[\p{L}_]+| ?\p{N}|\n| ?[^\s\p{L}\p{N}_]+|[^\S\n]+"


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Train the tokenizer.

    Args:
        texts: rendered events and canonical answers of the training split.
        vocabulary_size: number of tokens including specials and the 256 single bytes.

    Returns:
        A tokenizer with `PAD` as id 0, `EOS` as id 1 and no BOS; it adds no special tokens by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and the configuration that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n", "utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read ``tokenizer.json`` so that special strings in a text are plain text, as on the device."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer
