"""What transformers answers, written down once: the yardstick of parity, so that no comparison needs torch in memory.

A recording is a folder with `TENSORS_NAME` and `FACTS_NAME`. Tokens are chosen greedily with transformers' own cache,
which makes 64 steps of a 0.5B model a matter of seconds. What is written comes from one pass over the whole text
without a cache; where the two disagree, there is no yardstick and the recording is refused.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch.utils.hooks import RemovableHandle

from edge_agent.errors import PermanentError
from export.checkpoint.model import load_model
from export.checkpoint.source import Checkpoint

TENSORS_NAME = "recording.safetensors"
FACTS_NAME = "recording.json"
FORMAT = 1
PREFILL_TOKENS = 24
DECODE_STEPS = 64
CACHE_TOLERANCE = 2e-4
"""Largest accepted difference of transformers with its cache from transformers without, as a share of the largest
logit where that exceeds 1: a fifth of what a graph is allowed."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """One text as transformers computes it in fp32.

    Args:
        checkpoint_sha256: `Checkpoint.sha256` of the model.
        ids: token ids, int64 [prefill + decode]: a random prefill, then greedy tokens.
        logits: of the prefill's last position and of every decode step, float32 [decode + 1, vocab].
        hidden: residual stream before the first layer and after each, float32 [layers + 1, prefill, hidden].
        middle: residual stream between attention and MLP, float32 [layers, prefill, hidden]; None for architectures
            in which both read the same input.
    """

    checkpoint_sha256: str
    ids: npt.NDArray[np.int64]
    logits: Floats
    hidden: Floats
    middle: Floats | None

    @property
    def prefill_tokens(self) -> int:
        """Length of the prefill."""
        return int(self.hidden.shape[1])

    @property
    def decode_steps(self) -> int:
        """Greedy steps after the prefill."""
        return int(self.logits.shape[0]) - 1

    @property
    def max_abs_logit(self) -> float:
        """Largest logit: what differences are a share of."""
        return float(np.abs(self.logits).max())


def record_reference(
    checkpoint: Checkpoint, folder: Path, *, prefill_tokens: int = PREFILL_TOKENS, decode_steps: int = DECODE_STEPS
) -> Recording:
    """Run transformers once and write down what it does.

    Args:
        checkpoint: loaded in fp32, safetensors only, no code of its own.
        folder: receives both files.
        prefill_tokens: length of the random prefill.
        decode_steps: greedy steps after it.

    Returns:
        The recording. The torch model is freed.

    Raises:
        PermanentError: ``export.reference_failed`` when transformers cannot load or run the checkpoint, or its cache
            answers differently from itself.
    """
    recording = observe(checkpoint, prefill_tokens=prefill_tokens, decode_steps=decode_steps)
    _return_memory()
    tensors: dict[str, npt.NDArray[Any]] = {
        "ids": recording.ids,
        "logits": recording.logits,
        "hidden": recording.hidden,
    }
    if recording.middle is not None:
        tensors["middle"] = recording.middle
    raw = save_tensors(tensors)
    facts = {
        "format": FORMAT,
        "checkpoint_sha256": recording.checkpoint_sha256,
        "tensors_sha256": hashlib.sha256(raw).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS_NAME).write_bytes(raw)
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
    return recording


def load_recording(folder: Path) -> Recording:
    """Read a recording back.

    Raises:
        PermanentError: ``export.recording_invalid`` when a file is missing, damaged, or of another format.
    """
    try:
        facts = json.loads((folder / FACTS_NAME).read_text("utf-8"))
        raw = (folder / TENSORS_NAME).read_bytes()
        if facts["format"] != FORMAT:
            raise _invalid(f"format {facts['format']!r} is not {FORMAT}")
        if hashlib.sha256(raw).hexdigest() != facts["tensors_sha256"]:
            raise _invalid(f"{TENSORS_NAME} is damaged")
        tensors = load_tensors(raw)
        recording = Recording(
            str(facts["checkpoint_sha256"]),
            tensors["ids"],
            tensors["logits"],
            tensors["hidden"],
            tensors.get("middle"),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _invalid(f"{type(error).__name__}: {error}") from error
    if len(recording.ids) != recording.prefill_tokens + recording.decode_steps:
        raise _invalid("its tensors do not belong together")
    return recording


def observe(
    checkpoint: Checkpoint, *, prefill_tokens: int = PREFILL_TOKENS, decode_steps: int = DECODE_STEPS
) -> Recording:
    """`record_reference` without writing anything.

    Raises:
        PermanentError: ``export.reference_failed``.
    """
    rng = np.random.default_rng(0)
    prefill: list[int] = rng.integers(0, checkpoint.vocab_size, prefill_tokens).tolist()
    try:
        with _one_thread(), torch.inference_mode():
            model = load_model(checkpoint)
            ids, cached = _decode_greedily(model, prefill, decode_steps)  # cached: [decode + 1, vocab]
            with _watched_layers(model, int(checkpoint.config["num_hidden_layers"])) as seen:
                full = model(torch.tensor([ids]), use_cache=False).logits[0]  # [prefill + decode, vocab]
            logits = full[prefill_tokens - 1 :].float().clone()
            hidden, middle = seen.stacked(prefill_tokens)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise PermanentError("export.reference_failed", f"transformers cannot run the checkpoint: {error}") from error
    _check_cache(logits, cached)
    return Recording(checkpoint.sha256, np.array(ids, np.int64), logits.numpy(), hidden, middle)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order on every machine; and single tokens gain nothing from threads that wait for each other.

    On a machine with other work, two threads that spin at every barrier took ten times as long as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decode_greedily(model: torch.nn.Module, prefill: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    output = model(torch.tensor([prefill]), use_cache=True)
    rows, ids = [output.logits[0, -1]], list(prefill)
    for _ in range(steps):
        ids.append(int(rows[-1].argmax()))
        output = model(torch.tensor([ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        rows.append(output.logits[0, -1])
    return ids, torch.stack(rows)


def _check_cache(plain: torch.Tensor, cached: torch.Tensor) -> None:
    if not bool(plain.isfinite().all()):
        raise PermanentError("export.reference_failed", "transformers answers NaN or infinity")
    difference = float((plain - cached).abs().max())
    allowed = CACHE_TOLERANCE * max(1.0, float(plain.abs().max()))
    # Not `>`: a NaN must not pass.
    if not difference <= allowed:
        raise PermanentError(
            "export.reference_failed",
            f"transformers with its cache differs from transformers without by {difference:.3g} in a logit",
        )


class _Watched:
    """Residual streams that went by, one tensor [1, seq, hidden] per layer."""

    def __init__(self) -> None:
        self._before: list[torch.Tensor] = []
        self._between: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []
        # Of the layer that is running: each child's output with what the child read.
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def stacked(self, positions: int) -> tuple[Floats, Floats | None]:
        """(hidden [layers + 1, positions, hidden], middle [layers, positions, hidden] or None)."""
        hidden = _first_positions([self._before[0], *self._after], positions)
        # In a parallel block the MLP reads what the attention reads: there is no stream between them.
        parallel = any(left is right for left, right in zip(self._between, self._before, strict=False))
        if parallel or len(self._between) != len(self._after):
            return hidden, None
        return hidden, _first_positions(self._between, positions)

    def hook(self, layer: torch.nn.Module) -> list[RemovableHandle]:
        """Note what goes into, through and out of ``layer``."""
        mlp = getattr(layer, "mlp", None)

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._made.clear()
            self._before.append(args[0] if args else kwargs["hidden_states"])

        def through(child: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], torch.Tensor):
                return
            if child is mlp:
                # Behind a norm, the stream is what the norm read; without one, it is what the MLP reads.
                read = (inside for outside, inside in self._made if outside is args[0])
                self._between.append(next(read, args[0]))
            self._made.append((_first(output), args[0]))

        def leave(_: Any, __: Any, output: Any) -> None:
            self._after.append(_first(output))

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            *(child.register_forward_hook(through) for child in layer.children()),
            layer.register_forward_hook(leave),
        ]


@contextmanager
def _watched_layers(model: torch.nn.Module, count: int) -> Iterator[_Watched]:
    layers = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count), None)
    if layers is None:
        raise PermanentError("export.reference_failed", f"transformers' model has no list of {count} layers")
    seen = _Watched()
    hooks = [hook for layer in layers for hook in seen.hook(layer)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first_positions(streams: list[torch.Tensor], positions: int) -> Floats:
    # Contiguous, as files are: safetensors writes the memory behind a view, not the view.
    rows: Floats = torch.stack([stream[0, :positions] for stream in streams]).float().numpy()
    return rows


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps what the model's smaller tensors took, 80 % of it at 135M."""
    gc.collect()  # a model's modules and hooks refer to each other
    with suppress(OSError, AttributeError):  # another libc has no such function, and its own habits
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _invalid(reason: str) -> PermanentError:
    return PermanentError("export.recording_invalid", f"the recording of transformers cannot be used: {reason}")
