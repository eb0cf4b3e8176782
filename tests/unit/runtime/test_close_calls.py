"""What is too close for a fast pass to tell is decided in the plain way, and only that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.calibration import load_calibration
from edge_agent.runtime.decoder import Decoded
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from edge_agent.runtime.prepared import CLOSE_CALL, PreparedTask, Question
from edge_agent.runtime.speed import PLAIN
from tests.fakes import tokenizers

VOCAB = 512
PREFIX, PROMPT = (30, 31, 32, 33), [40, 41, 42]
PLAIN_VALUE, FAST_VALUE = True, False


class RoundsByLength:
    """A model that leans one way in a pass of several tokens and the other way in a pass of one.

    Args:
        yes: token of the value that single passes prefer.
        no: token of the value that longer passes prefer.
        margin: by how much, in logits.
        breaks_at: pass that raises instead.
    """

    def __init__(self, yes: int, no: int, margin: float, breaks_at: tuple[int, str] = (0, "")) -> None:
        self._yes, self._no, self._margin, self._breaks_at = yes, no, margin, breaks_at
        self.length = len(PREFIX)
        self.lengths: list[int] = []

    def rewind(self, length: int) -> None:
        assert length == len(PREFIX) <= self.length
        self.length = length

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.lengths.append(len(tokens))
        self.length += len(tokens)
        if len(self.lengths) == self._breaks_at[0]:
            raise PermanentError(self._breaks_at[1], "as told")
        scores = np.zeros(VOCAB, np.float32)
        scores[self._yes if len(tokens) == 1 else self._no] = self._margin
        return scores


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return TextEncoder(tokenizers.byte_level(folder / "tokenizer.json"), VOCAB)


def answered(
    encoder: TextEncoder, margin: float, breaks_at: tuple[int, str] = (0, "")
) -> tuple[Decoded | BaseException, list[int], int]:
    """The answer, the lengths of its passes, and how many tokens it has."""
    task = TaskSpec.model_validate(
        {
            "name": "task",
            "version": 1,
            "prompt": {"prefix": "p", "event": [{"field": "text", "label": "text"}]},
            "output": {"type": "object", "properties": {"flag": {"type": "boolean"}, "other": {"enum": ["only"]}}},
        }
    )
    plan = compile_plan(task, encoder, lambda: GuidedGrammars(encoder, VOCAB, 1))
    yes, no = (encoder.encode(word)[0] for word in ("true", "false"))
    model = RoundsByLength(yes, no, margin, breaks_at)
    prepared = PreparedTask(task, plan, load_calibration(None, task), model, PREFIX, (), PLAIN)  # type: ignore[arg-type]
    (found,) = prepared.decode([Question(PROMPT, math.inf)])
    return found, model.lengths, len(encoder.encode('{"flag":'))


def test_a_close_call_is_decided_one_token_at_a_time(encoder: TextEncoder) -> None:
    found, lengths, forced = answered(encoder, CLOSE_CALL * 0.9)
    assert isinstance(found, Decoded)
    assert found.values["flag"] is PLAIN_VALUE
    assert lengths == [len(PROMPT) + forced, len(PROMPT), *[1] * forced]
    assert found.passes == len(lengths), "both ways are counted"


def test_a_clear_answer_costs_no_second_look(encoder: TextEncoder) -> None:
    found, lengths, forced = answered(encoder, CLOSE_CALL * 1.1)
    assert isinstance(found, Decoded)
    assert found.values["flag"] is FAST_VALUE
    assert lengths == [len(PROMPT) + forced]
    assert found.margin == pytest.approx(CLOSE_CALL * 1.1)


def test_an_answer_stands_where_no_time_is_left_to_look_again(encoder: TextEncoder) -> None:
    found, _, _ = answered(encoder, CLOSE_CALL / 2, (3, "worker.deadline"))
    assert isinstance(found, Decoded)
    assert found.values["flag"] is FAST_VALUE


def test_a_fault_of_the_second_look_is_not_passed_over(encoder: TextEncoder) -> None:
    found, _, _ = answered(encoder, CLOSE_CALL / 2, (3, "worker.inference"))
    assert isinstance(found, PermanentError)
    assert found.code == "worker.inference"
