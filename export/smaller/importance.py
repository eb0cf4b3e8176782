"""Which layer a model can do without: measured on the task, once more after every layer that is taken out.

Two measures are taken of every layer and both are reported:

- *influence*: 1 - cosine between what enters and what leaves the layer, over all tokens of the probe (Block Influence
  of ShortGPT). It needs no second pass, and knows neither the task nor what later layers make of a change.
- *kl*: how far the answers' choices move, in nats, when the layer is left out. One pass a layer, on the task's own
  choices, against the whole model; in a deep model only for the layers of least influence.

The layer with the smallest kl goes. On the reference model the two disagree about the order, and kl is the one that
tells which model answers better (docs/smaller-models.md).

Source: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edge_agent.errors import RefusedError
from export.smaller.lessons import Batch
from export.smaller.smaller_checkpoint import Model
from export.smaller.teacher import Teacher, evaluating, final_states, fit

SHORTLIST = 8
"""Layers that are left out in turn each round: those of least influence. A pass each is dear in a deep model, and a
layer that turns every state around is none to lose."""


@dataclass(frozen=True)
class Importance:
    """One layer's.

    Args:
        layer: its number in the whole model.
        influence: 1 - mean cosine of its input and output, 0..2.
        kl_nats: divergence of a choice from the whole model's when it is left out too; None where that was not tried.
        loss_nats: negative log-probability of an answer's choice then.
    """

    layer: int
    influence: float
    kl_nats: float | None = None
    loss_nats: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON form, five decimals."""
        return {
            "layer": self.layer,
            "influence": round(self.influence, 5),
            "kl_nats": None if self.kl_nats is None else round(self.kl_nats, 5),
            "loss_nats": None if self.loss_nats is None else round(self.loss_nats, 5),
        }


@dataclass(frozen=True)
class Round:
    """One layer taken out.

    Args:
        dropped: its number in the whole model.
        layers: importance of every layer that was left before.
    """

    dropped: int
    layers: tuple[Importance, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"dropped": self.dropped, "layers": [layer.as_dict() for layer in self.layers]}


def check_drop(layers: int, drop: int) -> None:
    """Refuse to drop none or all.

    Args:
        layers: of the model.
        drop: to take out.

    Raises:
        RefusedError: ``export.layers_invalid``.
    """
    if not 1 <= drop < layers:
        raise RefusedError(
            "export.layers_invalid", f"of {layers} layers, 1 to {layers - 1} can be dropped, not {drop}", layers=layers
        )


def choose_layers(model: Model, probe: Sequence[Batch], drop: int) -> list[Round]:
    """Find the layers that matter least, greedily; the model itself is left as it is.

    Args:
        model: the whole model.
        probe: batches of lessons.
        drop: how many layers.

    Returns:
        One round a dropped layer, in order.

    Raises:
        RefusedError: ``export.layers_invalid``.
    """
    check_drop(len(model.model.layers), drop)
    whole = Teacher(model)
    for batch in probe:
        whole.log_probs(batch)  # remembered before any layer is missing
    left = list(range(len(model.model.layers)))
    rounds: list[Round] = []
    for _ in range(drop):
        with only_layers(model, left):
            found = dict(zip(left, map(Importance, left, block_influences(model, probe)), strict=True))
        for layer in sorted(left, key=lambda number: found[number].influence)[:SHORTLIST]:
            with only_layers(model, [other for other in left if other != layer]):
                without = fit(model, whole, probe)
            found[layer] = replace(found[layer], kl_nats=without.kl_nats, loss_nats=without.loss_nats)
        tried = [entry for entry in found.values() if entry.kl_nats is not None]
        # Of equals the later one: what it adds can reach fewer layers.
        least = min(tried, key=lambda entry: (entry.kl_nats, -entry.layer))
        left.remove(least.layer)
        rounds.append(Round(least.layer, tuple(found.values())))
    return rounds


def block_influences(model: Model, probe: Sequence[Batch]) -> list[float]:
    """1 - mean cosine between input and output of every layer, over all tokens that are not padding."""
    sums = [0.0] * len(model.model.layers)
    tokens = 0
    real = torch.zeros(0, dtype=torch.bool)  # (rows, length): set before each pass, read by the hooks

    def watch(number: int) -> Any:
        def hook(_layer: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output  # (rows, length, hidden)
            cosine = torch.nn.functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            sums[number] += float((1 - cosine)[real].sum())

        return hook

    hooks = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(model.model.layers)]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in probe:
                real = _is_real(batch)
                tokens += int(real.sum())
                final_states(model, batch.ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / max(1, tokens) for total in sums]


@contextlib.contextmanager
def only_layers(model: Model, numbers: Sequence[int]) -> Iterator[None]:
    """The model with some of its layers inside the block, whole again after it."""
    layers = model.model.layers
    try:
        model.model.layers = torch.nn.ModuleList([layers[number] for number in numbers])
        yield
    finally:
        model.model.layers = layers


def _is_real(batch: Batch) -> torch.Tensor:
    """What is not padding: bool (rows, length). A row's last choice is the last token that anything depends on."""
    last = torch.zeros(len(batch.ids), dtype=torch.int64)
    for at in (batch.at, batch.open_at):
        last.scatter_reduce_(0, at[0], at[1], reduce="amax")
    return torch.arange(batch.ids.shape[1]) <= last[:, None]
