"""A task's answers as a plan of decisions: everything that is not a choice is known before the first event.

An answer is compact JSON in schema order, ``{"category":"thermal","escalate":true}``. Keys, quotes and commas are
*forced*: they cost no decision and ride along with the next pass. Each closed field (enum, boolean, small integer
range) is a tree over the token sequences of its values, so that a pass is spent only where two values part, and the
probabilities of all values sum to one. Open fields (strings, wide integers) are driven by a byte-level grammar.

Tokens are canonical piece by piece: literal, value, literal. Prefix, event and answer are encoded apart for the same
reason: training and device must agree without looking at each other's neighbours.

A pruned head scores only some tokens. Forced tokens need no score; where values part at a token that has none, all
values that part there are written on byte by byte, so that like is compared with like and every value can be reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.contract.output import BoolField, EnumField, IntField, OutputField, TextField
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.guided import GuidedField, GuidedGrammars
from edge_agent.runtime.head_rows import HeadRows

Tokens = tuple[int, ...]
Value = str | bool | int
MAX_TREE_VALUES = 1024
"""Integer ranges up to this many values become a tree; wider ones are decoded by the byte-level grammar."""


@dataclass(frozen=True)
class Done:
    """The field has its value."""

    value: Value


@dataclass(frozen=True)
class Edge:
    """One token that may be chosen.

    Args:
        forced: tokens that follow the chosen one without a choice: the rest of the value, the next key.
        target: what is known or must be decided then.
    """

    forced: Tokens
    target: Branch | Done


@dataclass(frozen=True)
class Branch:
    """A point where values part.

    Args:
        ids: allowed token ids, int64 (options,), ascending.
        rows: their rows in the logits, int64 (options,).
        edges: in the order of ``ids``.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class ClosedField:
    """A field with finitely many values.

    Args:
        name: the field.
        forced: tokens before its first decision that its neighbours do not already force.
        root: its first decision, or its only value.
        max_tokens: longest way through the tree, ``forced`` and the following literal included.
    """

    name: str
    forced: Tokens
    root: Branch | Done
    max_tokens: int


PlannedField = ClosedField | GuidedField


@dataclass(frozen=True)
class AnswerPlan:
    """All decisions of one task.

    Args:
        opening: tokens up to the first field's value.
        fields: in schema order; each one's tokens end where the next field's value begins.
        max_tokens: upper bound of an answer's tokens.
    """

    opening: Tokens
    fields: tuple[PlannedField, ...]
    max_tokens: int


def compile_plan(
    task: TaskSpec, encoder: TextEncoder, guided: Callable[[], GuidedGrammars], head: HeadRows | None = None
) -> AnswerPlan:
    """Plan the answers of ``task``.

    Args:
        task: its output schema.
        encoder: the model's tokenizer.
        guided: makes the byte-level grammar compiler; called only when a field is open.
        head: the tokens that can be chosen; None: all.

    Returns:
        The plan.

    Raises:
        PermanentError: ``bundle.unsupported`` when the tokenizer cannot spell a key or a value,
            ``tokenizer.no_bytes`` when a value needs bytes that it has no tokens for.
    """
    fields = task.output_fields
    literals = list(_literals(fields))
    opening = _spell(encoder, literals[0])
    planner = _Planner(encoder, guided, head or HeadRows(encoder.vocab_size))
    planned = tuple(planner.field(f, after) for f, after in zip(fields, literals[1:], strict=True))
    return AnswerPlan(opening, planned, len(opening) + sum(f.max_tokens for f in planned))


def _literals(fields: Sequence[OutputField]) -> Iterator[str]:
    """The texts around the values: before the first, between neighbours, after the last."""
    text = "{"
    for position, field in enumerate(fields):
        comma = "," if position else ""
        yield f"{text}{comma}{json.dumps(field.name)}:{_quote(field)}"
        text = _quote(field)
    yield text + "}"


def _quote(field: OutputField) -> str:
    return '"' if isinstance(field, EnumField | TextField) else ""


class _Planner:
    """Plans field by field with one tokenizer and one head."""

    def __init__(self, encoder: TextEncoder, guided: Callable[[], GuidedGrammars], head: HeadRows) -> None:
        self._encoder = encoder
        self._guided = guided
        self._head = head

    def field(self, field: OutputField, after: str) -> PlannedField:
        """One field, and the literal that follows its value."""
        match field:
            case EnumField():
                # Quotes and backslashes inside a value are written as JSON writes them.
                spelled: dict[Value, str] = {v: json.dumps(v, ensure_ascii=False)[1:-1] for v in field.values}
                return self._closed(field.name, spelled, after)
            case BoolField():
                return self._closed(field.name, {True: "true", False: "false"}, after)
            case IntField():
                if field.maximum - field.minimum >= MAX_TREE_VALUES:
                    return self._guided().integer(field, after)
                numbers: dict[Value, str] = {v: str(v) for v in range(field.minimum, field.maximum + 1)}
                return self._closed(field.name, numbers, after)
            case TextField():
                return self._guided().text(field, after)

    def _closed(self, name: str, spelled: dict[Value, str], after: str) -> ClosedField:
        literal = _spell(self._encoder, after)
        for text in spelled.values():
            # Some tokenizers add a space to the front of every piece: joined, their pieces are another text.
            if self._encoder.decode([*_spell(self._encoder, text), *literal]) != text + after:
                raise PermanentError("bundle.unsupported", f"tokenizer cannot join {text!r} and {after!r}")
        # The literal ends every sequence, so "stop" and "stop_all" part at the quote after "stop".
        sequences = [(value, _spell(self._encoder, text) + literal) for value, text in spelled.items()]
        forced, root = self._grow(sequences, 0)
        return ClosedField(name, forced, root, _longest(forced, root))

    def _grow(self, sequences: list[tuple[Value, Tokens]], depth: int) -> tuple[Tokens, Branch | Done]:
        """The subtree of sequences that agree on their first ``depth`` tokens, with the tokens they share beyond."""
        if len(sequences) == 1:
            return sequences[0][1][depth:], Done(sequences[0][0])
        sequences = sorted(sequences, key=lambda item: item[1])
        first, last = sequences[0][1], sequences[-1][1]
        # Sorted, so what the first and the last share is shared by all.
        shared = depth
        while first[shared] == last[shared]:
            shared += 1
        if any(tokens[shared] not in self._head for _, tokens in sequences):
            by_bytes = [(value, self._written_on(tokens, shared)) for value, tokens in sequences]
            return self._grow(by_bytes, depth)
        groups: dict[int, list[tuple[Value, Tokens]]] = {}
        for value, tokens in sequences:
            groups.setdefault(tokens[shared], []).append((value, tokens))
        edges = tuple(Edge(*self._grow(group, shared + 1)) for group in groups.values())
        ids = np.array(list(groups), dtype=np.int64)
        return first[depth:shared], Branch(ids, self._head.rows(ids), edges)

    def _written_on(self, tokens: Tokens, place: int) -> Tokens:
        """The same text with one token written byte by byte."""
        spelled = self._encoder.spelling.by_bytes(tokens[place])
        if any(token not in self._head for token in spelled):
            raise PermanentError("bundle.unsupported", "the head lacks tokens of single bytes: some values have no way")
        return tokens[:place] + spelled + tokens[place + 1 :]


def _longest(forced: Tokens, target: Branch | Done) -> int:
    beyond = [1 + _longest(edge.forced, edge.target) for edge in target.edges] if isinstance(target, Branch) else [0]
    return len(forced) + max(beyond)


def _spell(encoder: TextEncoder, text: str) -> Tokens:
    ids = encoder.encode(text)
    if encoder.decode(ids) != text:
        raise PermanentError("bundle.unsupported", f"tokenizer cannot spell {text!r} of the answer")
    return tuple(ids)
