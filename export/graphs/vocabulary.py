"""Which tokens a domain's answers are written with, and what a head without the others can still write.

A pruned head scores the tokens of the domain's own texts, most frequent first, and beside them whatever must never be
missing: every single byte (so that any text can be written), the control tokens, and all that the bundle's tasks need.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.contract.output import TextField
from edge_agent.errors import PermanentError
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, Done, compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint
from export.tasks import TaskFolder

DEFAULT_ROWS = 8192
HEAD_IDS_NAME = "head_ids.bin"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a head keeps.

    Args:
        ids: token ids, int32 [rows], those first that are most frequent in the domain's texts: an embedding whose rows
            lie in this order is read at its beginning only, and little of a mapped file becomes memory.
        byte_tokens: how many of them are kept because they stand for a byte.
        control_tokens: because they are control tokens.
        answer_tokens: because answers of the bundle's tasks are written with them.
        domain_tokens: because the domain's texts are; each token is counted once, for the first of these reasons.
        dropped_tokens: tokens of the domain's texts for which no row was left.
    """

    ids: npt.NDArray[np.int32]
    byte_tokens: int
    control_tokens: int
    answer_tokens: int
    domain_tokens: int
    dropped_tokens: int

    def to_bytes(self) -> bytes:
        """The bundle's file of head ids: int32 little-endian."""
        return self.ids.astype("<i4").tobytes()

    def as_dict(self) -> dict[str, int]:
        """JSON form."""
        return {
            "rows": len(self.ids),
            "byte_tokens": self.byte_tokens,
            "control_tokens": self.control_tokens,
            "answer_tokens": self.answer_tokens,
            "domain_tokens": self.domain_tokens,
            "dropped_tokens": self.dropped_tokens,
        }


@dataclass(frozen=True)
class Reach:
    """What a pruned head can write of texts that it was not made from.

    Args:
        tokens: tokens of the texts as the tokenizer writes them.
        reachable: those of them that the head can choose.
        tokens_with_bytes: tokens of the same texts when the others are written byte by byte.
    """

    tokens: int
    reachable: int
    tokens_with_bytes: int

    def as_dict(self) -> dict[str, float | int]:
        """JSON form: counts, ``reachable_share`` and ``length_ratio`` (1.03: texts become 3 % longer)."""
        return {
            "tokens": self.tokens,
            "reachable": self.reachable,
            "reachable_share": round(self.reachable / self.tokens, 4),
            "tokens_with_bytes": self.tokens_with_bytes,
            "length_ratio": round(self.tokens_with_bytes / self.tokens, 4),
        }


def choose_vocabulary(
    checkpoint: Checkpoint, files: Sequence[Path], tasks: Sequence[TaskFolder], rows: int = DEFAULT_ROWS
) -> Vocabulary:
    """Choose the tokens of a pruned head.

    Args:
        checkpoint: its tokenizer and control tokens.
        files: the domain's texts: UTF-8, or ``.jsonl`` of which every string counts.
        tasks: the bundle's tasks.
        rows: tokens to keep; more where bytes, control tokens and answers alone are more.

    Returns:
        The choice; equal input gives the equal choice.

    Raises:
        PermanentError: ``tokenizer.no_bytes`` when a byte has no token, ``export.vocab_text_invalid``.
    """
    encoder = TextEncoder(checkpoint.path / TOKENIZER_NAME, checkpoint.vocab_size)
    kept: dict[int, None] = {}
    sizes = [0]
    for reason in (encoder.spelling.byte_ids, _control_tokens(checkpoint), _answer_tokens(encoder, checkpoint, tasks)):
        kept.update(dict.fromkeys(reason))
        sizes.append(len(kept))
    in_bytes, in_control, in_answers = np.diff(sizes).tolist()
    counted = Counter(token for text in read_texts(files) for token in encoder.encode(text))

    def most_frequent_first(token: int) -> tuple[int, int]:
        return -counted[token], token

    frequent = sorted(counted.keys() - kept.keys(), key=most_frequent_first)
    taken = frequent[: max(0, rows - len(kept))]
    kept.update(dict.fromkeys(taken))
    ids = np.array(sorted(kept, key=most_frequent_first), np.int32)
    return Vocabulary(ids, in_bytes, in_control, in_answers, len(taken), len(frequent) - len(taken))


def reach(checkpoint: Checkpoint, vocabulary: Vocabulary, files: Sequence[Path]) -> Reach:
    """Measure on held-out texts what a pruned head can write.

    Args:
        checkpoint: its tokenizer.
        vocabulary: what the head keeps.
        files: texts that it was not made from.

    Raises:
        PermanentError: ``export.vocab_text_invalid``.
    """
    encoder = TextEncoder(checkpoint.path / TOKENIZER_NAME, checkpoint.vocab_size)
    kept = frozenset(vocabulary.ids.tolist())
    tokens = reachable = with_bytes = 0
    for text in read_texts(files):
        for token in encoder.encode(text):
            tokens += 1
            reachable += token in kept
            with_bytes += 1 if token in kept else len(encoder.spelling.by_bytes(token))
    return Reach(tokens, reachable, with_bytes)


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """The texts of files: lines of UTF-8, or every string in lines of JSON.

    Raises:
        PermanentError: ``export.vocab_text_invalid``.
    """
    for file in files:
        found = False
        try:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    for text in _texts_of_line(line, f"{file}, line {number}", is_json=file.suffix == ".jsonl"):
                        found = found or bool(text.strip())
                        yield text
        except OSError as error:
            raise PermanentError("export.vocab_text_invalid", f"{file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise PermanentError("export.vocab_text_invalid", f"{file}: not UTF-8: {error}") from error
        if not found:
            raise PermanentError("export.vocab_text_invalid", f"{file}: there is no text in it")


def _texts_of_line(line: str, where: str, *, is_json: bool) -> Iterator[str]:
    if not is_json:
        yield line
    elif line.strip():
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PermanentError("export.vocab_text_invalid", f"{where}: not JSON: {error}") from error
        yield from _strings(parsed)


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _strings(inner)
        case list():
            for inner in value:
                yield from _strings(inner)


def _control_tokens(checkpoint: Checkpoint) -> set[int]:
    spec = json.loads((checkpoint.path / TOKENIZER_NAME).read_text("utf-8"))
    special = {int(added["id"]) for added in spec.get("added_tokens") or [] if added.get("special")}
    ends = {checkpoint.eos_token_id, checkpoint.bos_token_id} - {None}
    return {token for token in special | ends if token is not None and token < checkpoint.vocab_size}


def _answer_tokens(encoder: TextEncoder, checkpoint: Checkpoint, tasks: Sequence[TaskFolder]) -> set[int]:
    def guided() -> GuidedGrammars:
        return GuidedGrammars(encoder, checkpoint.vocab_size, checkpoint.eos_token_id)

    found: set[int] = set()
    for task in tasks:
        found.update(_plan_tokens(compile_plan(task.spec, encoder, guided)))
        open_texts = [field.name for field in task.spec.output_fields if isinstance(field, TextField)]
        for example in task.golden:
            for name in open_texts:
                written = json.dumps(example.decision[name], ensure_ascii=False)[1:-1]
                found.update(encoder.encode(written))
    return found


def _plan_tokens(plan: AnswerPlan) -> Iterator[int]:
    yield from plan.opening
    for field in plan.fields:
        if isinstance(field, ClosedField):
            yield from field.forced
            yield from _tree_tokens(field.root)


def _tree_tokens(node: Branch | Done) -> Iterator[int]:
    if isinstance(node, Branch):
        for token, edge in zip(node.ids.tolist(), node.edges, strict=True):
            yield token
            yield from edge.forced
            yield from _tree_tokens(edge.target)
