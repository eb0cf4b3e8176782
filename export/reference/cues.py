"""Auxiliary heads: while training, the model also says what it understood before it answers.

The severity follows from up to seven cues at once. With the answer alone as a teacher the model finds them slowly;
small linear heads on the last prompt token, one a cue, show it where to look. They are dropped with the training
state and are no part of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn

from export.reference.generator import ALL_MODES
from export.reference.rules import Situation, measured_band

_QUALIFIERS = ("none", "test", "maintenance", "cleared", "nominal")
_MODE_INDEX = {mode.name: index for index, mode in enumerate(ALL_MODES, start=1)}
CUE_CLASSES = (len(ALL_MODES) + 1, 5, 5, 2, len(_QUALIFIERS), 2, 2)
"""Classes of mode, stated band, measured band, repeated, qualifier, halted and injected."""


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


class CueHeads(nn.Module):
    """One linear classifier a cue.

    Args:
        hidden: width of the model.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self._norm = nn.LayerNorm(hidden)
        self._heads = nn.ModuleList(nn.Linear(hidden, classes) for classes in CUE_CLASSES)

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over the batch of the mean cross entropy of all cues.

        Args:
            states: (rows, hidden), the hidden state of the last prompt token.
            labels: (rows, cues) int64.

        Returns:
            A scalar.
        """
        normal = self._norm(states.float())
        losses = [
            nn.functional.cross_entropy(head(normal).float(), labels[:, index], reduction="sum")
            for index, head in enumerate(self._heads)
        ]
        return torch.stack(losses).sum() / len(losses)
