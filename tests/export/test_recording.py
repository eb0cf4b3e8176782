"""A recording says what transformers says, survives the way to disk, and is never used damaged."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from edge_agent.errors import EdgeError
from export.checkpoint.source import open_checkpoint
from export.checkpoint.synth import synthesise
from export.proof.recording import FACTS_NAME, TENSORS_NAME, Recording, _check_cache, load_recording, record_reference
from tests.export.conftest import TINY, change_config


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    record_reference(open_checkpoint(llama), folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A recording that a test may damage."""
    for name in (FACTS_NAME, TENSORS_NAME):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def code_of(folder: Path) -> str:
    with pytest.raises(EdgeError) as caught:
        load_recording(folder)
    return caught.value.code


def test_recording_has_prefill_decode_steps_and_every_layer(folder: Path, llama: Path) -> None:
    recording = load_recording(folder)
    assert (recording.prefill_tokens, recording.decode_steps) == (24, 64)
    assert recording.ids.shape == (24 + 64,)
    assert recording.logits.shape == (65, 1024)
    assert recording.hidden.shape == (3, 24, 128)
    assert recording.middle is not None
    assert recording.middle.shape == (2, 24, 128)
    assert recording.checkpoint_sha256 == open_checkpoint(llama).sha256


def test_recording_is_what_transformers_computes(folder: Path, llama: Path) -> None:
    recording = load_recording(folder)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        output = model(torch.tensor(recording.ids[None]), output_hidden_states=True, use_cache=False)
        normed = model.model.norm(torch.tensor(recording.hidden[-1]))
    assert np.array_equal(output.logits[0, 23:].numpy(), recording.logits)
    # transformers hands its last hidden state out behind the final norm, all others as they are.
    assert np.array_equal(output.hidden_states[0][0, :24].numpy(), recording.hidden[0])
    assert np.array_equal(output.hidden_states[1][0, :24].numpy(), recording.hidden[1])
    assert np.abs(output.hidden_states[2][0, :24].numpy() - normed.numpy()).max() < 1e-5


def test_decoded_tokens_are_greedy(folder: Path) -> None:
    recording = load_recording(folder)
    assert recording.logits[:-1].argmax(-1).tolist() == recording.ids[24:].tolist()


def test_layer_is_its_middle_and_what_the_mlp_adds(folder: Path, llama: Path) -> None:
    recording = load_recording(folder)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    assert recording.middle is not None
    with torch.inference_mode():
        for layer, middle, after in zip(model.model.layers, recording.middle, recording.hidden[1:], strict=True):
            added = layer.mlp(layer.post_attention_layernorm(torch.tensor(middle)))
            assert np.abs(middle + added.numpy() - after).max() < 1e-4


def test_the_torch_model_is_gone_when_the_recording_is_done(llama: Path, tmp_path: Path) -> None:
    def models() -> int:
        gc.collect()
        # Not isinstance(): it would wake lazy modules up by asking them for their class.
        return sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())

    before = models()
    record_reference(open_checkpoint(llama), tmp_path, prefill_tokens=4, decode_steps=2)
    assert models() == before


RESIDENT = """
import sys
from pathlib import Path
from export.proof.recording import record_reference
from export.checkpoint.source import open_checkpoint

def resident_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

small, large = (open_checkpoint(Path(name)) for name in sys.argv[1:3])
record_reference(small, Path(sys.argv[3]), prefill_tokens=4, decode_steps=2)  # what torch keeps for itself
before = resident_bytes()
record_reference(large, Path(sys.argv[3]), prefill_tokens=4, decode_steps=2)
print(resident_bytes() - before)
"""


@pytest.mark.slow
def test_memory_of_the_torch_model_goes_back_to_the_system(llama: Path, tmp_path: Path) -> None:
    shape = {**TINY, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
    parameters = synthesise("smollm2-135m", tmp_path / "checkpoint", layers=8, **shape)
    command = [sys.executable, "-c", RESIDENT, str(llama), str(tmp_path / "checkpoint"), str(tmp_path / "recording")]
    grown_bytes = int(subprocess.run(command, check=True, capture_output=True, timeout=100).stdout)
    assert parameters > 20_000_000
    assert grown_bytes < parameters * 4 / 5


def test_shorter_recordings_are_possible(llama: Path, tmp_path: Path) -> None:
    recording = record_reference(open_checkpoint(llama), tmp_path, prefill_tokens=5, decode_steps=3)
    assert (recording.prefill_tokens, recording.decode_steps) == (5, 3)
    again = load_recording(tmp_path)
    for name in Recording.__dataclass_fields__:
        assert np.array_equal(getattr(again, name), getattr(recording, name))


def test_truncated_recording_is_refused(copy: Path) -> None:
    raw = (copy / TENSORS_NAME).read_bytes()
    (copy / TENSORS_NAME).write_bytes(raw[: len(raw) // 2])
    assert code_of(copy) == "export.recording_invalid"


def test_flipped_bit_is_found(copy: Path) -> None:
    raw = bytearray((copy / TENSORS_NAME).read_bytes())
    raw[-10] ^= 1
    (copy / TENSORS_NAME).write_bytes(raw)
    assert code_of(copy) == "export.recording_invalid"


@pytest.mark.parametrize("name", [FACTS_NAME, TENSORS_NAME])
def test_half_a_recording_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert code_of(copy) == "export.recording_invalid"


@pytest.mark.parametrize("facts", ["", "[]", "{}", '{"format": 1}', "\x00"])
def test_broken_facts_are_refused(copy: Path, facts: str) -> None:
    (copy / FACTS_NAME).write_text(facts)
    assert code_of(copy) == "export.recording_invalid"


def test_recording_of_another_format_is_refused(copy: Path) -> None:
    facts = json.loads((copy / FACTS_NAME).read_text())
    (copy / FACTS_NAME).write_text(json.dumps({**facts, "format": 2}))
    assert code_of(copy) == "export.recording_invalid"


def test_checkpoint_that_transformers_cannot_load_has_no_yardstick(checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, hidden_act="no-such-function")
    with pytest.raises(EdgeError) as caught:
        record_reference(open_checkpoint(checkpoint), tmp_path / "recording")
    assert caught.value.code == "export.reference_failed"
    assert not (tmp_path / "recording").exists()


@pytest.mark.parametrize(("plain", "cached"), [(1.0, 1.001), (float("nan"), 1.0), (1.0, float("nan")), (1e4, 1.0)])
def test_cache_that_contradicts_the_whole_text_makes_no_yardstick(plain: float, cached: float) -> None:
    with pytest.raises(EdgeError) as caught:
        _check_cache(torch.full((2, 8), plain), torch.full((2, 8), cached))
    assert caught.value.code == "export.reference_failed"


def test_rounding_of_a_large_logit_is_no_contradiction() -> None:
    _check_cache(torch.full((2, 8), 20.0), torch.full((2, 8), 20.001))
