"""What a change costs on the task's own texts: distance from the fp32 graph at every token of every answer.

`export.proof.parity.between` walks graphs token by token, as a device does. Here a whole text takes one pass, and the
fp32 graph runs once for all comparisons: a sensitivity asks a hundred times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from export.graphs.graph import LOGITS
from export.proof.parity import Agreement
from export.quantisation.probe import Floats, Probe, Text, common_prefix, require_texts

MAX_POSITIONS = 384
"""Scored positions: enough for two digits, and of a vocabulary of 150,000 the reference takes 230 MB."""


class Scorer:
    """The fp32 graph's predictions on some texts, to hold others against.

    Args:
        reference: the fp32 graph.
        texts: prompts with their answers; as many of the first as ``positions`` allows.
        purpose: who asks, for the refusal.
        positions: scored positions.

    Raises:
        RefusedError: ``export.calibration_missing``.
    """

    def __init__(self, reference: Probe, texts: Sequence[Text], purpose: str, positions: int = MAX_POSITIONS) -> None:
        self._texts = _within(texts, positions)
        require_texts(self._texts, purpose)
        self._prefix = common_prefix([prompt for prompt, _ in self._texts])
        self._past = self._prefilled(reference)
        self._expected = self._predictions(reference, self._past)

    def agreement(self, graph: Probe, exchanged: Mapping[str, Floats] | None = None) -> Agreement:
        """Score a graph.

        Args:
            graph: the same architecture and vocabulary.
            exchanged: weights to take in place of its own; then the graph must be the reference, and the caches of what
                all texts begin with are the reference's, too: they would cost as much as all the rest.

        Returns:
            The figures.
        """
        positions = same = tokens = 0
        divergence = surprise = expected_surprise = 0.0
        past = self._past if exchanged else self._prefilled(graph)
        found = self._predictions(graph, past, exchanged)
        for (_, answer), left, right in zip(self._texts, self._expected, found, strict=True):
            positions += len(left)
            same += int((left.argmax(-1) == right.argmax(-1)).sum())
            divergence += float((np.exp(left) * (left - right)).sum())
            scored = np.arange(len(answer))
            expected_surprise -= float(left[scored, list(answer)].sum())
            surprise -= float(right[scored, list(answer)].sum())
            tokens += len(answer)
        return Agreement(
            positions=positions,
            same_top1=same,
            mean_kl=divergence / positions,
            tokens=tokens,
            fp32_perplexity=math.exp(expected_surprise / max(1, tokens)),
            perplexity=math.exp(surprise / max(1, tokens)),
        )

    def _prefilled(self, graph: Probe) -> dict[str, Floats]:
        return graph.prefill(self._prefix, graph.start()) if self._prefix else graph.start()

    def _predictions(
        self, graph: Probe, past: Mapping[str, Floats], exchanged: Mapping[str, Floats] | None = None
    ) -> list[Floats]:
        """Log-probabilities after the prompt and after each token of the answer: [answer + 1, vocab] a text."""
        found = []
        for prompt, answer in self._texts:
            ids = [*prompt[len(self._prefix) :], *answer]
            wanted = range(len(ids) - len(answer) - 1, len(ids))
            found.append(_log_softmax(graph.run(ids, past, wanted, exchanged)[LOGITS][0]))
        return found


def _within(texts: Sequence[Text], positions: int) -> list[Text]:
    kept: list[Text] = []
    for prompt, answer in texts:
        if not prompt or len(answer) + 1 > positions:
            continue
        positions -= len(answer) + 1
        kept.append((prompt, answer))
    return kept


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
