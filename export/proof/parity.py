"""Is the graph still the model? fp32 against transformers, INT4 against fp32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_agent.contract.manifest import ModelSpec
from edge_agent.errors import PermanentError
from export.checkpoint.source import Checkpoint
from export.proof.greedy import Floats, StepModel
from export.proof.parting import Parting, find_parting
from export.proof.recording import Recording, observe

TOLERANCE = 1e-3
"""Largest accepted logit difference, as a share of the largest logit where that exceeds 1.

Rounding is relative: a model whose logits reach 30 cannot be held to the same absolute difference as one whose logits
reach 1. Either way the greedy tokens must be the same.
"""


class Steps(Protocol):
    """What is compared: `export.proof.greedy.StepModel`, or a test's stand-in."""

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
        positions: compared positions: the end of the prefill and every greedy step.
        parting: where the two part; None where they agree, or where no graph on disk was looked into.
    """

    max_abs_diff: float
    max_abs_logit: float
    same_tokens: bool
    positions: int
    parting: Parting | None = None

    @property
    def holds(self) -> bool:
        """Whether the graph may be shipped."""
        return self.same_tokens and self.max_abs_diff <= TOLERANCE * max(1.0, self.max_abs_logit)

    def require(self) -> None:
        """Stop the build of a graph that is not the model.

        Raises:
            PermanentError: ``export.parity_failed``.
        """
        if self.holds:
            return
        tokens = "" if self.same_tokens else " and in its greedy tokens"
        where = f"; the graphs part {self.parting}" if self.parting else ""
        raise PermanentError(
            "export.parity_failed",
            f"the fused graph differs from transformers by {self.max_abs_diff:.3g} in a logit{tokens}{where}",
            max_abs_diff=self.max_abs_diff,
            same_tokens=self.same_tokens,
            parts_at=str(self.parting) if self.parting else None,
        )


@dataclass(frozen=True)
class Agreement:
    """A quantised graph beside the fp32 one, teacher-forced along the same tokens.

    Args:
        positions: compared positions.
        same_top1: positions where both hold the same token for the likeliest.
        mean_kl: mean Kullback-Leibler divergence KL(fp32 || quantised), nats.
        tokens: tokens of the continuations, over which perplexity is taken.
        fp32_perplexity: of the continuations under the fp32 graph; 1 where there are no tokens.
        perplexity: of the same tokens under the quantised graph.
    """

    positions: int
    same_top1: int
    mean_kl: float
    tokens: int
    fp32_perplexity: float
    perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the quantised graph over that of the fp32 graph: 1.02 is 2 % more surprise per token."""
        return self.perplexity / self.fp32_perplexity

    def as_dict(self) -> dict[str, float | int]:
        """JSON form, rounded to what another run of the same machine repeats.

        ``positions``, ``same_top1``, ``top1_agreement`` (their ratio), ``mean_kl_nats``, ``tokens``,
        ``fp32_perplexity``, ``perplexity``, ``perplexity_ratio``.
        """
        return {
            "positions": self.positions,
            "same_top1": self.same_top1,
            "top1_agreement": round(self.same_top1 / self.positions, 4),
            "mean_kl_nats": round(self.mean_kl, 4),
            "tokens": self.tokens,
            "fp32_perplexity": round(self.fp32_perplexity, 3),
            "perplexity": round(self.perplexity, 3),
            "perplexity_ratio": round(self.perplexity_ratio, 4),
        }


def against_recording(recording: Recording, model: Steps) -> Parity:
    """Prefill and decode with a graph what transformers prefilled and decoded.

    Args:
        recording: of the checkpoint the graph was built from.
        model: the fused fp32 graph.

    Returns:
        What was found.
    """
    ids = recording.ids.tolist()
    following = ids[recording.prefill_tokens :]
    logits, past = model.step(ids[: recording.prefill_tokens], model.start())
    worst, same = 0.0, True
    for expected, token in zip(recording.logits, [*following, None], strict=True):  # expected: [vocab]
        difference = float(np.abs(logits - expected).max())
        # max() would lose a NaN, and a graph that answers NaN is as wrong as can be.
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        wanted, taken = int(expected.argmax()), int(logits.argmax())
        # Of two tokens that the reference itself can hardly tell apart, either will do.
        same = same and (wanted == taken or float(expected[wanted] - expected[taken]) <= TOLERANCE)
        if token is not None:
            logits, past = model.step([token], past)
    return Parity(worst, recording.max_abs_logit, same, len(recording.logits))


def prove_parity(recording: Recording, graph: Path, spec: ModelSpec, threads: int = 1) -> Parity:
    """Hold a graph on disk against a recording, and look for the layer where they part if they do.

    Args:
        recording: of the checkpoint the graph was built from.
        graph: the fused fp32 graph.
        spec: its shape.
        threads: intra-op threads.

    Returns:
        The figures, with `Parity.parting` where they do not hold; ask `Parity.require` to stop the build.

    Raises:
        PermanentError: ``export.graph_unloadable``.
    """
    parity = against_recording(recording, StepModel(graph, spec, threads))
    return parity if parity.holds else replace(parity, parting=find_parting(graph, recording))


def against_transformers(checkpoint: Checkpoint, model: Steps) -> Parity:
    """Record transformers in memory and compare at once: for small models and tests.

    Args:
        checkpoint: loaded by transformers in fp32.
        model: the fused fp32 graph.

    Returns:
        What was found.

    Raises:
        PermanentError: ``export.reference_failed`` when transformers cannot load the checkpoint.
    """
    return against_recording(observe(checkpoint), model)


Texts = Sequence[tuple[list[int], list[int]]]
"""Prompt ids with continuation ids."""


def between(fp32: Steps, quantised: Steps, texts: Texts) -> Agreement:
    """Compare two graphs along given texts.

    Args:
        fp32: the reference.
        quantised: the candidate.
        texts: (prompt ids, continuation ids): compared after the prompt and after each token of the continuation,
            over the tokens that ``quantised`` can choose.

    Returns:
        The figures.
    """
    return between_all([(fp32, quantised, texts)])


def between_all(pairs: Iterable[tuple[Steps, Steps, Texts]]) -> Agreement:
    """`between` for several pairs of graphs, counted together.

    Args:
        pairs: the reference, the candidate and their texts. Taken one by one, so that two graphs are loaded at a time.

    Returns:
        The figures.
    """
    positions = same = tokens = 0
    divergence = left_surprise = right_surprise = 0.0
    for fp32, quantised, prompt, continuation in ((a, b, *text) for a, b, texts in pairs for text in texts):
        left, left_past = fp32.step(prompt, fp32.start())
        right, right_past = quantised.step(prompt, quantised.start())
        for token in [*continuation, None]:
            # A pruned head scores -inf what it cannot choose: both are held to what both can.
            kept = np.isfinite(right) | np.isnan(right)
            p, q = _log_softmax(left[kept]), _log_softmax(right[kept])  # [rows]
            positions += 1
            same += int(p.argmax()) == int(q.argmax())
            divergence += float((np.exp(p) * (p - q)).sum())
            if token is not None:
                if kept[token]:
                    row = int(kept[:token].sum())
                    tokens += 1
                    left_surprise -= float(p[row])
                    right_surprise -= float(q[row])
                left, left_past = fp32.step([token], left_past)
                right, right_past = quantised.step([token], right_past)
    return Agreement(
        positions,
        same,
        divergence / max(1, positions),
        tokens,
        math.exp(left_surprise / max(1, tokens)),
        math.exp(right_surprise / max(1, tokens)),
    )


def _log_softmax(logits: Floats) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result
