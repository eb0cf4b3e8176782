"""A smaller network of the teacher's kind, begun from what the teacher's activations say is worth keeping.

A student has the teacher's vocabulary and tokenizer; any of depth, width, heads and inner width may be smaller. It
keeps whole channels, heads and neurons of the teacher: those that carry most on the task's own prompts. How much that
is worth against random weights is measured in docs/smaller-models.md.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024 (activation-based
importance of width); the rescaling of norms is ours.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_agent.errors import PermanentError, RefusedError
from export.checkpoint.source import Checkpoint
from export.smaller.lessons import Batch
from export.smaller.smaller_checkpoint import Model
from export.smaller.teacher import evaluating, final_states

WIDTH_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SHAPE_KEYS = (*WIDTH_KEYS, "num_hidden_layers")
NAMED_SHAPES = ("half-width", "half-depth", "half-both")
CHANNEL_MULTIPLE = 32
"""Halves are rounded up to whole blocks of the quantisation."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a network.

    Args:
        hidden: channels of the residual stream.
        intermediate: neurons of a feed-forward layer.
        layers: their number.
        heads: query heads.
        kv_heads: key-value heads.
        head_dim: channels of a head.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads a key-value head."""
        return self.heads // self.kv_heads


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """Read sizes from ``config.json``, with the defaults that transformers takes."""
    heads = int(config["num_attention_heads"])
    return Dimensions(
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
    )


def student_config(into: str, teacher: Checkpoint) -> dict[str, Any]:
    """``config.json`` of the student, depth still the teacher's where layers are chosen later.

    Args:
        into: a name of `NAMED_SHAPES`, or the path of a JSON file with some of `SHAPE_KEYS`. Other keys may be there
            when they say what the teacher's configuration says.
        teacher: the larger model.

    Raises:
        PermanentError: ``export.config_invalid`` for a file that cannot be read, ``export.vocab_mismatch``.
        RefusedError: ``export.student_invalid``.
    """
    wanted = _named(into, dimensions(teacher.config)) if into in NAMED_SHAPES else _read(Path(into))
    if wanted.get("vocab_size", teacher.vocab_size) != teacher.vocab_size:
        raise PermanentError(
            "export.vocab_mismatch",
            f"the student has {wanted['vocab_size']} rows, but shares a tokenizer with {teacher.vocab_size}",
        )
    for name, value in wanted.items():
        if name not in SHAPE_KEYS and value != teacher.config.get(name):
            raise RefusedError(
                "export.student_invalid", f"{name} is not part of a student's shape: {', '.join(SHAPE_KEYS)}"
            )
        if name in SHAPE_KEYS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RefusedError("export.student_invalid", f"{name} must be a positive integer, not {value!r}")
    # A head keeps its size when the model becomes narrower, unless the shape says otherwise.
    config = {**teacher.config, "head_dim": dimensions(teacher.config).head_dim, **wanted}
    _check(dimensions(config), dimensions(teacher.config))
    return config


def _named(into: str, whole: Dimensions) -> dict[str, int]:
    halves: dict[str, int] = {}
    if into != "half-depth":
        kv_heads = max(1, whole.kv_heads // 2)
        # The group keeps its size, unless there is only one key-value head to share.
        group = whole.group if whole.kv_heads > 1 else max(1, whole.group // 2)
        halves = {
            "hidden_size": _half(whole.hidden),
            "intermediate_size": _half(whole.intermediate),
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
        }
    if into != "half-width":
        halves["num_hidden_layers"] = max(1, whole.layers // 2)
    return halves


def _half(size: int) -> int:
    return -(-size // 2 // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def _read(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PermanentError("export.config_invalid", f"{path}: {error}") from error
    if not isinstance(parsed, dict):
        raise PermanentError("export.config_invalid", f"{path} is not a JSON object")
    return parsed


def _check(student: Dimensions, whole: Dimensions) -> None:
    pairs = [(name, getattr(student, name), getattr(whole, name)) for name in Dimensions.__dataclass_fields__]
    for name, size, limit in pairs:
        if size > limit:
            raise RefusedError("export.student_invalid", f"{name}: {size} is larger than the teacher's {limit}")
    if student == whole:
        raise RefusedError("export.student_invalid", "the student's shape is the teacher's")
    if student.heads % student.kv_heads or student.head_dim % 2:
        raise RefusedError(
            "export.student_invalid",
            f"{student.heads} heads cannot share {student.kv_heads} key-value heads, or head_dim is odd",
        )


@dataclass(frozen=True)
class _Energy:
    """What flows through a model on the task's prompts.

    Args:
        channels: float64 (hidden,): mean square of each channel of the residual stream after normalisation.
        heads: per layer float64 (heads,): mean square of what a head adds to the stream.
        neurons: per layer float64 (intermediate,): the same of a neuron.
        norms: mean square of each norm's input by channel, by the norm's name; float64 (hidden,).
    """

    channels: torch.Tensor
    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]
    norms: dict[str, torch.Tensor]


def begin_from(teacher: Model, student: Model, probe: Sequence[Batch]) -> int:
    """Give a student of the same depth the teacher's most active channels, heads and neurons.

    Args:
        teacher: the larger model.
        student: its weights are replaced.
        probe: batches of lessons.

    Returns:
        Number of matrices that kept their random weights because no part of the teacher's fits.
    """
    whole, small = dimensions(teacher.config.to_dict()), dimensions(student.config.to_dict())
    energy = _measure(teacher, probe, whole)
    channels = _largest(energy.channels, small.hidden)
    source = dict(teacher.named_parameters())
    left = 0
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            rows, columns = _axes(name, energy, channels, whole, small)
            tensor = source[name]
            for axis, chosen in enumerate((rows, columns)):
                if chosen is not None:
                    tensor = tensor.index_select(axis, chosen)
            if tensor.shape != parameter.shape:
                left += 1
                continue
            parameter.copy_(tensor)
        _rescale_norms(student, energy, channels)
    return left


def _axes(
    name: str, energy: _Energy, channels: torch.Tensor, whole: Dimensions, small: Dimensions
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which rows and which columns of a parameter are kept; None for all."""
    kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    if kind in ("gate_proj", "up_proj", "down_proj"):
        neurons = _largest(energy.neurons[layer], small.intermediate)
        return (channels, neurons) if kind == "down_proj" else (neurons, channels)
    if kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
        queries, keys = _heads(energy.heads[layer], whole, small)
        if kind == "o_proj":
            return channels, queries
        inputs = channels if name.endswith(".weight") else None
        return (queries if kind == "q_proj" else keys), inputs
    if kind in ("embed_tokens", "lm_head"):
        return None, channels
    if kind in ("q_norm", "k_norm"):
        return None, None
    return channels, None  # norms of the stream


def _heads(energy: torch.Tensor, whole: Dimensions, small: Dimensions) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the query and of the key-value projections that are kept: whole heads, the strongest of each group."""
    grouped = energy.reshape(whole.kv_heads, whole.group)
    kept_groups = _largest(grouped.sum(dim=1), small.kv_heads)
    queries = [
        group * whole.group + int(head)
        for group in kept_groups.tolist()
        for head in _largest(grouped[group], min(small.group, whole.group))
    ]
    return _channels_of(queries, whole.head_dim), _channels_of(kept_groups.tolist(), whole.head_dim)


def _channels_of(heads: list[int], head_dim: int) -> torch.Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _largest(energy: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest, ascending, so that what is kept keeps its order."""
    return energy.argsort(descending=True, stable=True)[:count].sort().values


def _rescale_norms(student: Model, energy: _Energy, channels: torch.Tensor) -> None:
    """Give what is left of each channel the size that it had: the kept channels' mean square is another one."""
    gemma = student.config.model_type.startswith("gemma")
    for name, squares in energy.norms.items():
        weight = student.get_parameter(f"{name}.weight")
        factor = float((squares[channels].mean() / squares.mean().clamp_min(1e-30)).sqrt())
        # Gemma stores weights as their difference from one.
        weight.copy_((1 + weight) * factor - 1 if gemma else weight * factor)
    if gemma:
        # Its embedding is multiplied by the root of the width; the head shares the matrix and must not notice.
        whole = next(iter(energy.norms.values())).numel()
        gain = (whole / len(channels)) ** 0.5
        student.model.embed_tokens.weight.mul_(gain)
        final = student.model.norm.weight
        final.copy_((1 + final) / gain - 1)


def _measure(teacher: Model, probe: Sequence[Batch], whole: Dimensions) -> _Energy:
    """Run the probe and add up squares; padding takes part, which is the same token for every channel."""
    sums: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def add(store: dict[str, torch.Tensor], name: str, states: torch.Tensor) -> None:
        squares = states.double().square().flatten(0, -2).mean(dim=0)  # (channels,)
        store[name] = store[name] + squares if name in store else squares

    def watch_norm(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            add(sums, name, inputs[0])
            add(after, name, output)

        return hook

    def watch_input(name: str) -> Any:
        return lambda _module, inputs: add(sums, name, inputs[0])

    with contextlib.ExitStack() as hooks, torch.no_grad(), evaluating(teacher):
        for name, module in teacher.named_modules():
            kind = name.rpartition(".")[2]
            if kind.endswith("norm") and kind not in ("q_norm", "k_norm"):
                hooks.enter_context(_hooked(module.register_forward_hook(watch_norm(name))))
            if kind in ("o_proj", "down_proj"):
                hooks.enter_context(_hooked(module.register_forward_pre_hook(watch_input(name))))
        for batch in probe:
            final_states(teacher, batch.ids)
    heads, neurons = [], []
    for number, layer in enumerate(teacher.model.layers):
        outward = layer.self_attn.o_proj.weight.double().square().sum(dim=0)  # (heads * head_dim,)
        added = sums[f"model.layers.{number}.self_attn.o_proj"] * outward
        heads.append(added.reshape(whole.heads, whole.head_dim).sum(dim=1).detach())
        down = layer.mlp.down_proj.weight.double().square().sum(dim=0)  # (intermediate,)
        neurons.append((sums[f"model.layers.{number}.mlp.down_proj"] * down).detach())
    norms = {name: squares for name, squares in sums.items() if name in after}
    channels = torch.stack([squares / squares.mean() for squares in after.values()]).sum(dim=0)
    return _Energy(channels, heads, neurons, norms)


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
