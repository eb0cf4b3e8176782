"""Auxiliary heads: while training, the model also says what it understood before it answers.

The severity follows from up to seven cues at once. With the answer alone as a teacher the model finds them slowly;
small linear heads on the last prompt token, one a cue, show it where to look, and one on each line that holds a number
teaches it to read digits. They are dropped with the training state and are no part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from export.reference.generator import ALL_MODES
from export.reference.rules import BAND_LOWER_BOUNDS_PERCENT, Situation, measured_band

if TYPE_CHECKING:
    from export.reference.examples import Batch

_QUALIFIERS = ("none", "test", "maintenance", "cleared", "nominal")
_MODE_INDEX = {mode.name: index for index, mode in enumerate(ALL_MODES, start=1)}
CUE_CLASSES = (len(ALL_MODES) + 1, 5, 5, 2, len(_QUALIFIERS), 2, 2)
"""Classes of mode, stated band, measured band, repeated, qualifier, halted and injected."""
_SIGNED_BOUNDS = tuple(sorted((0, *(sign * bound for bound in BAND_LOWER_BOUNDS_PERCENT for sign in (1, -1)))))
DEVIATION_CLASSES = len(_SIGNED_BOUNDS) + 1
"""Signed bands of the deviation line."""


def cue_labels(situation: Situation) -> tuple[int, ...]:
    """The class of every cue, in the order of `CUE_CLASSES`; 0 where a cue is absent."""
    measured = measured_band(situation)
    return (
        _MODE_INDEX[situation.mode.name] if situation.mode else 0,
        0 if situation.stated is None else situation.stated + 1,
        0 if measured is None else measured + 1,
        int(situation.repeated),
        _QUALIFIERS.index(situation.qualifier),
        int(situation.halted),
        int(situation.injected),
    )


def deviation_class(percent: int) -> int:
    """Which of `DEVIATION_CLASSES` signed bands a deviation lies in, whatever sign is the bad one."""
    return sum(percent >= bound for bound in _SIGNED_BOUNDS)


class CueHeads(nn.Module):
    """Linear classifiers: one a cue on the last prompt token, one at the end of each line that holds a number.

    Args:
        hidden: width of the model.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self._norm = nn.LayerNorm(hidden)
        self._heads = nn.ModuleList(nn.Linear(hidden, classes) for classes in CUE_CLASSES)
        self._deviation = nn.Linear(hidden, DEVIATION_CLASSES)
        self._count = nn.Linear(hidden, 2)

    def forward(self, inputs: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the batch: the mean of all cues, and of each number.

        Args:
            inputs: what enters each layer, (rows, length, hidden).
            batch: the batch, for positions and labels.

        Returns:
            A scalar.
        """
        rows = torch.arange(len(batch.ids))
        # Before the last layer, so that the answer's tokens can still attend to what was understood.
        understood = self._norm(inputs[-1][rows, batch.prompt_tokens - 1].float())  # (rows, hidden)
        losses = [
            nn.functional.cross_entropy(head(understood).float(), batch.cues[:, index], reduction="sum")
            for index, head in enumerate(self._heads)
        ]
        loss = torch.stack(losses).sum() / len(losses)
        loss = loss + self._line_loss(self._deviation, inputs, batch.deviation_at, batch.deviation)
        return loss + self._line_loss(self._count, inputs, batch.count_at, batch.count)

    def _line_loss(
        self, head: nn.Module, inputs: Sequence[torch.Tensor], at: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy at token ``at`` of the rows that have the line (``at`` > 0), summed over them."""
        shown = at > 0
        # In the middle of the network: reading a number is local, and the layers above have to use it.
        read = self._norm(inputs[len(inputs) // 2][shown, at[shown]].float())  # (rows with the line, hidden)
        return nn.functional.cross_entropy(head(read).float(), labels[shown], reduction="sum")
