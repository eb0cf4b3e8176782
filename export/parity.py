"""Is the graph still the model? fp32 against transformers, INT4 against fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edge_agent.errors import PermanentError
from export.greedy import Floats
from export.source import Checkpoint

PREFILL_TOKENS = 24
DECODE_STEPS = 16
TOLERANCE = 1e-3
"""Largest accepted logit difference, as a share of the largest logit where that exceeds 1."""


class Steps(Protocol):
    """What is compared: `export.greedy.StepModel`, or a test's stand-in."""

    def start(self) -> dict[str, Floats]:
        """Empty caches."""
        ...

    def step(self, ids: list[int], past: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """Logits of the last position, float32 [vocab], and the longer caches."""
        ...


@dataclass(frozen=True)
class Parity:
    """The fp32 graph beside transformers.

    Args:
        max_abs_diff: largest logit difference over all compared positions.
        max_abs_logit: largest logit of the reference.
        same_tokens: whether both took the same token at every step.
        positions: compared positions.
    """

    max_abs_diff: float
    max_abs_logit: float
    same_tokens: bool
    positions: int

    @property
    def holds(self) -> bool:
        """Whether the graph may be shipped."""
        return self.same_tokens and self.max_abs_diff <= TOLERANCE * max(1.0, self.max_abs_logit)


@dataclass(frozen=True)
class Agreement:
    """A quantised graph beside the fp32 one, teacher-forced along the same tokens.

    Args:
        positions: compared positions.
        same_top1: positions where both hold the same token for the likeliest.
        mean_kl: mean Kullback-Leibler divergence KL(fp32 || quantised), nats.
    """

    positions: int
    same_top1: int
    mean_kl: float

    def as_dict(self) -> dict[str, float | int]:
        """JSON form, rounded to what another run of the same machine repeats."""
        return {
            "positions": self.positions,
            "same_top1": self.same_top1,
            "top1_agreement": round(self.same_top1 / self.positions, 4),
            "mean_kl_nats": round(self.mean_kl, 4),
        }


def against_transformers(checkpoint: Checkpoint, model: Steps) -> Parity:
    """Prefill and greedy decode with both.

    Args:
        checkpoint: loaded by transformers in fp32, safetensors only, no code of its own.
        model: the fused fp32 graph.

    Returns:
        What was found.

    Raises:
        PermanentError: ``export.reference_failed`` when transformers cannot load the checkpoint.
    """
    reference = _load_reference(checkpoint)
    rng = np.random.default_rng(0)
    ids: list[int] = rng.integers(0, checkpoint.vocab_size, PREFILL_TOKENS).tolist()
    logits, past = model.step(ids, model.start())
    worst = largest = 0.0
    same = True
    for _ in range(DECODE_STEPS + 1):
        with torch.inference_mode():
            # The whole sequence anew each time: the reference shall not depend on its own cache.
            expected: Floats = reference(torch.tensor([ids])).logits[0, -1].numpy()  # [vocab]
        difference = float(np.abs(logits - expected).max())
        # max() would lose a NaN, and a graph that answers NaN is as wrong as can be.
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        largest = max(largest, float(np.abs(expected).max()))
        token, taken = int(expected.argmax()), int(logits.argmax())
        # Of two tokens that the reference itself can hardly tell apart, either will do.
        same = same and (token == taken or float(expected[token] - expected[taken]) <= TOLERANCE)
        ids.append(token)
        logits, past = model.step([token], past)
    return Parity(worst, largest, same, DECODE_STEPS + 1)


def between(fp32: Steps, quantised: Steps, texts: Sequence[tuple[list[int], list[int]]]) -> Agreement:
    """Compare two graphs along given texts.

    Args:
        fp32: the reference.
        quantised: the candidate.
        texts: (prompt ids, continuation ids): compared after the prompt and after each token of the continuation.

    Returns:
        The figures.
    """
    positions = same = 0
    divergence = 0.0
    for prompt, continuation in texts:
        left, left_past = fp32.step(prompt, fp32.start())
        right, right_past = quantised.step(prompt, quantised.start())
        for token in [*continuation, None]:
            positions += 1
            same += int(left.argmax()) == int(right.argmax())
            divergence += _kl(left, right)
            if token is not None:
                left, left_past = fp32.step([token], left_past)
                right, right_past = quantised.step([token], right_past)
    return Agreement(positions, same, divergence / max(1, positions))


def _kl(left: Floats, right: Floats) -> float:
    p, q = _log_softmax(left), _log_softmax(right)
    return float((np.exp(p) * (p - q)).sum())


def _log_softmax(logits: Floats) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result


def _load_reference(checkpoint: Checkpoint) -> torch.nn.Module:
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PermanentError("export.reference_failed", f"transformers cannot load the checkpoint: {error}") from error
    return model.eval()
