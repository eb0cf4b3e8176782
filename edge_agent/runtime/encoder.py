"""Text to token ids, with one promise: text is only ever text, never a control token.

An event may contain the very string that the model's special token has (``<|im_end|>``). Every added token is
marked special before the tokenizer is built, and special tokens in text are encoded as the characters they are.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edge_agent.errors import PermanentError
from edge_agent.runtime.spelling import ByteSpelling, read_spelling
from edge_agent.runtime.token_table import TokenTable


class TextEncoder:
    """A tokenizer that cannot be talked into control tokens.

    Args:
        tokenizer_file: ``tokenizer.json`` in the Hugging Face format.
        vocab_size: number of ids that the model knows.
        table: the same as a `TokenTable`; the file is then read only for those who ask for `spec_json`.

    Raises:
        PermanentError: ``bundle.unsupported`` when this version cannot read one of the files, or they name more ids
            than the model has.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, table: Path | None = None) -> None:
        self._file = tokenizer_file
        self.vocab_size = vocab_size
        self._tokens: _Library | TokenTable = _Library(tokenizer_file) if table is None else TokenTable(table)
        if self._tokens.count > vocab_size:
            raise PermanentError(
                "bundle.unsupported", f"tokenizer has id {self._tokens.count - 1}, the model only {vocab_size} ids"
            )

    @cached_property
    def spelling(self) -> ByteSpelling:
        """The bytes behind the tokens; only a pruned head asks for them.

        Raises:
            PermanentError: ``tokenizer.no_bytes``.
        """
        return self._tokens.spelling

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text may produce."""
        return self._tokens.control_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; never a control token.

        Raises:
            PermanentError: ``tokenizer.failed`` for text that it cannot express.
        """
        try:
            ids = self._tokens.encode(text)
        except Exception as error:  # lone surrogates arrive as TypeError, the rest as bare Exception
            raise PermanentError("tokenizer.failed", f"text cannot be tokenised: {error}") from error
        if not self.control_ids.isdisjoint(ids):
            raise PermanentError("tokenizer.failed", "text was tokenised into a control token")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, control tokens left out."""
        return self._tokens.decode(ids)

    def spec_json(self) -> str:
        """The tokenizer as JSON, for the grammar engine that needs every token's bytes.

        Raises:
            PermanentError: ``bundle.unsupported``.
        """
        library = self._tokens if isinstance(self._tokens, _Library) else _Library(self._file)
        return library.spec_json()


class _Library:
    """The tokenizer's own library, which reads every file of the format."""

    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
            ordinary = [token for token in self._tokenizer.get_added_tokens_decoder().values() if not token.special]
            # Adding a token again changes what it is, not its id.
            self._tokenizer.add_special_tokens([AddedToken(token.content, special=True) for token in ordinary])
        except Exception as error:  # the library raises bare Exception
            raise PermanentError("bundle.unsupported", f"tokenizer cannot be read: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.control_ids = frozenset(self._tokenizer.get_added_tokens_decoder())
        self.count = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def spelling(self) -> ByteSpelling:
        return read_spelling(self.spec_json())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def spec_json(self) -> str:
        text: Any = self._tokenizer.to_str()
        return str(text)
