"""Random checkpoints have the published shapes: what is measured on them is the speed of the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from edge_agent.errors import EdgeError
from export.checkpoint.source import MAX_PARAMETERS, open_checkpoint
from export.checkpoint.synth import SHAPES, count_parameters, make_tokenizer, synthesise
from tests.export.conftest import TINY

# As the models' own pages and weight files have them.
PUBLISHED_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma3-270m": 268_098_176,
    "ernie4.5-0.3b": 360_748_032,
    "pythia-160m": 162_322_944,
}


@pytest.mark.parametrize("like", SHAPES)
def test_shape_has_the_published_number_of_parameters(like: str) -> None:
    assert count_parameters(like) == PUBLISHED_PARAMETERS[like]
    assert count_parameters(like) <= MAX_PARAMETERS


@pytest.mark.parametrize("vocab_size", sorted({257, *(int(shape["vocab_size"]) for shape in SHAPES.values())}))
def test_tokenizer_has_exactly_one_token_per_row(vocab_size: int) -> None:
    tokenizer = make_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size(with_added_tokens=True) == vocab_size
    assert sorted(tokenizer.get_vocab(with_added_tokens=True).values()) == list(range(vocab_size))
    text = "pump: Druck unter Sollwert ☂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("like", SHAPES)
def test_written_configuration_says_what_the_shape_says(like: str, tmp_path: Path) -> None:
    changes = {**TINY, "num_attention_heads": 2, "head_dim": 64}
    parameters = synthesise(like, tmp_path / "checkpoint", layers=1, **changes)
    opened = open_checkpoint(tmp_path / "checkpoint")
    assert opened.parameters == parameters
    config = AutoConfig.from_pretrained(tmp_path / "checkpoint")
    for name, value in {**SHAPES[like], **changes, "num_hidden_layers": 1}.items():
        assert getattr(config, name) == value, name


def test_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EdgeError) as caught:
        count_parameters("gpt-5")
    assert caught.value.code == "export.shape_unknown"
    assert "smollm2-135m" in caught.value.detail
