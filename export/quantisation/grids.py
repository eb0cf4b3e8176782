"""Rules that lay the grid of a block of weights: extremes, least squares, half-quadratic.

Each takes float32 [rows, blocks, block_size], the bits of a code and whether the zero is the middle code, and returns
the `Grid`. Blocks of zeros get scale 1: any would do, but not 0.
"""

from __future__ import annotations

import torch

from export.quantisation.block_weights import Grid, codes_of, middle

SEARCH_STEPS = 20
"""Scales that the search tries for each block."""
HQQ_STEPS = 20
_HQQ_NORM = 0.7
_HQQ_BETA = 10.0
_HQQ_BETA_GROWTH = 1.01


def extremes(blocks: torch.Tensor, bits: int, symmetric: bool) -> Grid:  # noqa: FBT001 - a GridRule
    """The grid that just reaches a block's extreme weights.

    Symmetric: the signed extreme is the lowest code, as in onnxruntime's own kernel and in llama.cpp's Q4_0.
    """
    if symmetric:
        extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)  # [rows, blocks], signed
        return Grid(_never_zero(extreme / -middle(bits)), None)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = _never_zero((high - low) / (2**bits - 1))
    return Grid(scale, torch.round(-low / scale).clamp(0, 2**bits - 1))


def least_squares(blocks: torch.Tensor, bits: int, symmetric: bool) -> Grid:  # noqa: FBT001 - a GridRule
    """The grid of smallest weighted squared error among `SEARCH_STEPS` candidates; large weights count for more.

    Each candidate is a little wider or narrower than the extremes ask for. Its zero is rounded to a code first and its
    scale fitted after that: what rounding the zero costs is part of what is compared.

    Source: after make_qx_quants and make_qkx2_quants of llama.cpp's ggml-quants.c (which fit the zero as a float).
    """
    importance = blocks.abs() + blocks.square().mean(-1, keepdim=True).sqrt()
    half, highest = middle(bits), 2**bits - 1
    best = extremes(blocks, bits, symmetric)
    scale, zero = best.scale, best.zero
    best_gain = torch.full_like(scale, -torch.inf)
    for step in range(SEARCH_STEPS + 1):
        width = 2 * step / SEARCH_STEPS - 1  # -1 ... 1 codes
        reach = (half + width) / half if symmetric else (highest + width) / highest
        candidate = best.scale / reach
        around = None if best.zero is None else torch.round(best.zero * reach).clamp_(0, highest)
        steps = codes_of(blocks, Grid(candidate, around), bits) - (half if around is None else around.unsqueeze(-1))
        weighted = importance * steps
        product, square = (weighted * blocks).sum(-1), (weighted * steps).sum(-1)  # [rows, blocks]
        fitted = product / square.clamp(min=1e-30)
        gain = fitted * product  # what the best scale for these codes takes off the squared error
        better = (gain > best_gain) & (square > 0)
        best_gain = torch.where(better, gain, best_gain)
        scale = torch.where(better, fitted, scale)
        zero = None if zero is None or around is None else torch.where(better, around, zero)
    return Grid(_never_zero(scale), zero)


def half_quadratic(blocks: torch.Tensor, bits: int, symmetric: bool) -> Grid:  # noqa: FBT001 - a GridRule
    """Zeros between codes that minimise a norm below 1 of the error, so that outliers cost little.

    Source: Badri & Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, with its defaults.

    Raises:
        ValueError: for symmetric grids: the zero is what the method optimises.
    """
    if symmetric:
        raise ValueError("half-quadratic quantisation has no symmetric form")
    highest = 2**bits - 1
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    inverse = torch.where(high > low, highest / (high - low).clamp(min=1e-30), torch.ones_like(low)).clamp(max=2e4)
    zero = torch.round(-low * inverse)
    beta, best = _HQQ_BETA, torch.inf
    for _ in range(HQQ_STEPS):
        codes = torch.round(blocks * inverse + zero).clamp_(0, highest)
        residual = blocks - (codes - zero) / inverse
        error = float(residual.abs().mean())
        if error >= best:
            break
        best = error
        magnitude = residual.abs()
        shrunk = residual.sign() * torch.relu(magnitude - (magnitude + 1e-8).pow(_HQQ_NORM - 1) / beta)
        zero = torch.mean(codes - (blocks - shrunk) * inverse, dim=-1, keepdim=True)
        beta *= _HQQ_BETA_GROWTH
    return Grid((1 / inverse).squeeze(-1), zero.squeeze(-1))


def _never_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
