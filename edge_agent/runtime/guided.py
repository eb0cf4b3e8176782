"""Open fields: strings and wide integer ranges, decoded against a byte-level grammar (llguidance).

Each grammar covers the value and the literal after it, so that a token which ends the value and begins the next key
(``","``) stays possible. llguidance is loaded only for tasks that have such fields.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.contract.output import IntField, TextField
from edge_agent.errors import PermanentError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.head_rows import HeadRows

# One unit is one character of the decoded string: no \uXXXX, because half a surrogate pair is no character.
_CHARACTER = r'([^"\\\x00-\x1F\x7F]|\\["\\/bfnrt])'
_EXTRA_TOKENS = 8


@dataclass(frozen=True)
class GuidedField:
    """A field whose values cannot be listed.

    Args:
        name: the field.
        quoted: whether the value stands in quotes (a string) or not (an integer).
        after: the literal that follows the value.
        max_tokens: bound of value and literal together.
        close_at: for strings, number of tokens after which the closing quote is taken as soon as it is allowed.
        closing_ids: tokens that close the string.
        template: the compiled grammar in its initial state.
        tokenizer: the grammar engine's tokenizer.
        head: the tokens that can be chosen; those of single bytes are among them, so something always can.
    """

    name: str
    quoted: bool
    after: str
    max_tokens: int
    close_at: int
    closing_ids: frozenset[int]
    template: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    head: HeadRows = field(repr=False)

    def start(self) -> GuidedRun:
        """A fresh run of the grammar for one answer."""
        return GuidedRun(self)


class GuidedRun:
    """One value being decoded."""

    def __init__(self, planned: GuidedField) -> None:
        self._field = planned
        self._matcher = planned.template.deep_copy()
        self._tokens: list[int] = []
        self._mask: NDArray[np.int32] = np.zeros((planned.head.vocab_size + 31) // 32, dtype=np.int32)

    def forced(self) -> list[int]:
        """Tokens that follow without a choice; they are consumed."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if tokens:
            self._consume(tokens)
        return tokens

    def finished(self) -> bool:
        """Whether value and literal are complete (the literal is fixed, so accepting means finished)."""
        return bool(self._matcher.is_accepting())

    def allowed(self) -> NDArray[np.int64]:
        """Token ids that may come next and can be chosen, int64 (options,), ascending."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._raise_fault()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._field.head.vocab_size]
        ids = self._field.head.kept(np.flatnonzero(bits))
        if self._field.quoted and len(self._tokens) >= self._field.close_at:
            closing = [i for i in ids.tolist() if i in self._field.closing_ids]
            # Not allowed in the middle of a character: one or two more tokens complete it.
            ids = np.array(closing, dtype=np.int64) if closing else ids
        if not len(ids):
            raise PermanentError("worker.grammar", f"no token can continue field {self._field.name!r}")
        return ids

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the logits that score ``ids``."""
        return self._field.head.rows(ids)

    def choose(self, token: int) -> None:
        """Consume a chosen token."""
        self._consume([token])

    def value(self) -> str | int:
        """The finished value."""
        text = self._field.tokenizer.decode_bytes(self._tokens).decode("utf-8")
        literal = text.removesuffix(self._field.after)
        parsed: str | int = json.loads(f'"{literal}"' if self._field.quoted else literal)
        return parsed

    def _consume(self, tokens: list[int]) -> None:
        self._matcher.consume_tokens(tokens)
        self._raise_fault()
        self._tokens.extend(tokens)

    def _raise_fault(self) -> None:
        # The matcher never raises by itself: it goes silent.
        fault = self._matcher.get_error()
        if fault:
            raise PermanentError("worker.grammar", f"grammar engine failed on {self._field.name!r}: {fault}")


class GuidedGrammars:
    """Compiles open fields for one tokenizer.

    Args:
        encoder: the model's tokenizer.
        vocab_size: token ids of the tokenizer.
        eos_token_id: the model's end token.
        head: the tokens that can be chosen; None: all.

    Raises:
        PermanentError: ``bundle.unsupported`` when the grammar engine cannot read the tokenizer, or the head lacks
            tokens of single bytes.
    """

    def __init__(self, encoder: TextEncoder, vocab_size: int, eos_token_id: int, head: HeadRows | None = None) -> None:
        import llguidance

        self._matcher_class = llguidance.LLMatcher
        self._encoder = encoder
        self._head = head or HeadRows(vocab_size)
        if not self._head.whole and any(token not in self._head for token in encoder.spelling.byte_ids):
            raise PermanentError("bundle.unsupported", "the head lacks tokens of single bytes: open fields need them")
        try:
            self._tokenizer = llguidance.LLTokenizer(encoder.spec_json(), n_vocab=vocab_size, eos_token=eos_token_id)
        except Exception as error:  # the library raises bare ValueError and panics
            raise PermanentError("bundle.unsupported", f"grammar engine rejects the tokenizer: {error}") from error

    def text(self, planned: TextField, after: str) -> GuidedField:
        """A string of at most ``planned.max_length`` characters, then ``after``."""
        pattern = f"{_CHARACTER}{{0,{planned.max_length}}}{re.escape(after)}"
        grammar = self._matcher_class.grammar_from_regex(pattern)
        # Usually a token is a character or more; scripts that need more tokens are closed early, at a character.
        return self._field(planned.name, grammar, after, value_tokens=planned.max_length, quoted=True)

    def integer(self, planned: IntField, after: str) -> GuidedField:
        """An integer of a wide range, then ``after``."""
        bounds = {"type": "integer", "minimum": planned.minimum, "maximum": planned.maximum}
        grammar = self._matcher_class.grammar_from_lark(f"start: %json {json.dumps(bounds)} {json.dumps(after)}")
        digits = max(len(str(planned.minimum)), len(str(planned.maximum)))
        return self._field(planned.name, grammar, after, value_tokens=digits, quoted=False)

    def _field(self, name: str, grammar: str, after: str, *, value_tokens: int, quoted: bool) -> GuidedField:
        template = self._matcher_class(self._tokenizer, grammar)
        fault = template.get_error()
        if fault:
            raise PermanentError("bundle.unsupported", f"grammar of field {name!r}: {fault}")
        return GuidedField(
            name=name,
            quoted=quoted,
            after=after,
            max_tokens=value_tokens + len(after.encode()) + _EXTRA_TOKENS,
            close_at=value_tokens,
            closing_ids=self._closing_ids(),
            template=template,
            tokenizer=self._tokenizer,
            head=self._head,
        )

    def _closing_ids(self) -> frozenset[int]:
        """The tokens that close a string: its quote, or the quote's byte where the head lacks the quote."""
        quote = self._encoder.encode('"')[-1]
        if quote in self._head:
            return frozenset({quote})
        return frozenset(self._encoder.spelling.by_bytes(quote)[-1:])
