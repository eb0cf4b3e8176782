"""A tokenizer of another model, or one that cannot say everything, must not become a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from edge_agent.errors import EdgeError
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import EOS, make_tokenizer
from tests.export.conftest import change_config
from tests.export.test_source_refusals import code_of


def test_tokenizer_of_a_much_smaller_model_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, vocab_size=49_152)
    assert code_of(checkpoint) == "export.vocab_mismatch"


def test_rows_that_only_fill_up_are_no_mismatch(checkpoint: Path) -> None:
    # 151,936 rows for 151,669 tokens is what Qwen has; here 1024 for 1000.
    make_tokenizer(1000).save(str(checkpoint / "tokenizer.json"))
    assert open_checkpoint(checkpoint).vocab_size == 1024


def test_tokenizer_whose_end_token_is_a_word_is_refused(checkpoint: Path) -> None:
    # Same size, other model: its control token stands elsewhere.
    spec = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    word = next(token for token, number in vocabulary.items() if number == 700)
    vocabulary[EOS], vocabulary[word] = 700, 0
    spec["added_tokens"][0]["id"] = 700
    (checkpoint / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(EdgeError) as caught:
        open_checkpoint(checkpoint)
    assert caught.value.code == "export.tokenizer_mismatch"
    assert word in caught.value.detail


def test_end_token_that_the_tokenizer_lacks_is_refused(checkpoint: Path) -> None:
    make_tokenizer(1000).save(str(checkpoint / "tokenizer.json"))
    change_config(checkpoint, eos_token_id=1010)
    assert code_of(checkpoint) == "export.tokenizer_mismatch"


def lower_case(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def ascii_only(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])


def without_decoder(tokenizer: Tokenizer) -> None:
    tokenizer.decoder = decoders.Fuse()


def one_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])


@pytest.mark.parametrize("spoil", [lower_case, ascii_only, without_decoder, one_space])
def test_tokenizer_that_does_not_give_text_back_is_refused(
    checkpoint: Path, spoil: Callable[[Tokenizer], None]
) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    spoil(tokenizer)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert code_of(checkpoint) == "export.tokenizer_lossy"


def test_tokenizer_without_most_letters_is_refused(checkpoint: Path) -> None:
    words = Tokenizer(models.WordLevel({EOS: 0, "stop": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.add_special_tokens([EOS])
    words.save(str(checkpoint / "tokenizer.json"))
    assert code_of(checkpoint) == "export.tokenizer_lossy"


def test_training_settings_of_a_tokenizer_do_not_make_it_lossy(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert open_checkpoint(checkpoint).bos_token_id is None


def test_control_token_for_which_the_model_has_no_row_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """Gemma 3 270M: 262,144 rows, and `<image_soft_token>` is number 262,144."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert code_of(checkpoint) == "export.vocab_mismatch"
    opened = open_checkpoint(checkpoint, scratch=tmp_path / "scratch")
    fitted = Tokenizer.from_file(str(opened.path / "tokenizer.json"))
    assert fitted.get_vocab_size(with_added_tokens=True) == 1024
    assert fitted.token_to_id(EOS) == 0
    assert fitted.encode("hydraulic pressure").ids == tokenizer.encode("hydraulic pressure").ids
    assert opened.weight_files == (opened.path / "model.safetensors",)
    assert opened.sha256 == open_checkpoint(checkpoint, scratch=tmp_path / "again").sha256


@pytest.mark.parametrize("content", ["[]", '{"added_tokens": 3}', '{"added_tokens": [{"id": "x"}]}', "\x00"])
def test_broken_tokenizer_is_refused_before_it_is_rewritten(checkpoint: Path, tmp_path: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    assert code_of(checkpoint, scratch=tmp_path / "scratch") == "export.tokenizer_invalid"
