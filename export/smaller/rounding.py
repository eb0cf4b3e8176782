"""INT4 during training: the forward pass sees the weights that the device will have.

A model of a few million parameters has no slack: rounding its weights after training costs accuracy. In the last
part of training every matrix is rounded for the forward and backward pass, and the gradient is applied to the
unrounded weights (straight-through estimation).

Source: onnxruntime's symmetric block-wise quantisation for MatMulNBits (scale = signed extreme / -8, range -8..7).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

BLOCK = 32
"""Weights a scale, along the input dimension."""


def round_to_int4(weight: torch.Tensor, *, block: int = BLOCK) -> torch.Tensor:
    """Round a matrix as symmetric block-wise INT4 does.

    Args:
        weight: (outputs, inputs); float. A last block that is not full is rounded by itself, as the kernel pads it.
        block: weights a scale.

    Returns:
        The dequantised matrix, same shape and dtype.
    """
    rows, columns = weight.shape
    padded = nn.functional.pad(weight, (0, -columns % block))
    blocks = padded.reshape(rows, -1, block)  # (outputs, blocks, block)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))  # (outputs, blocks, 1), signed
    scale = extreme / -8
    # A block of zeros has no scale and stays zero.
    steps = torch.where(scale == 0, torch.zeros_like(blocks), blocks / scale).round_().clamp_(-8, 7)
    return (steps * scale).reshape(rows, -1)[:, :columns].contiguous()


@contextmanager
def int4_weights(model: nn.Module) -> Iterator[None]:
    """Every matrix of ``model`` rounded to INT4 inside the block and restored after it; gradients are kept."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    originals = [parameter.data for parameter in matrices]
    try:
        for parameter in matrices:
            parameter.data = round_to_int4(parameter.data)
        yield
    finally:
        for parameter, original in zip(matrices, originals, strict=True):
            parameter.data = original
