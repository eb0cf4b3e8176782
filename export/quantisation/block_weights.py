"""Matrices as MatMulNBits holds them: small integers on a grid of their own for every block of a row.

A weight is ``(code - zero) * scale``. Scales are rounded to what float16 holds where that costs nothing (`storable`):
then the file can keep 16 bits of them while the arithmetic stays float32, 4.5 bits a weight at block 32 instead of 5.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

SCALE_ERROR = 2.0**-10
"""Largest accepted error of a stored scale: at most 8 x this, 1/128 of a step, where rounding itself errs by 1/2."""
_THREADS = os.cpu_count() or 1
_WEIGHTS_AT_ONCE = 1 << 18
"""A chunk and what is computed of it stay in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero of each block; ``round(weight / scale + zero)`` is the code.

    Args:
        scale: float32 [rows, blocks], never 0.
        zero: float32 [rows, blocks]; None where it is the middle code of every block (symmetric).
    """

    scale: torch.Tensor
    zero: torch.Tensor | None


GridRule = Callable[[torch.Tensor, int, bool], Grid]
"""(float32 [rows, blocks, block_size], bits, symmetric) -> the grid of each block."""


@dataclass(frozen=True)
class BlockWeights:
    """A quantised matrix, packed as MatMulNBits and GatherBlockQuantized read it (lowest bits first).

    Args:
        packed: uint8 [rows, blocks, block_size * bits / 8].
        scales: float32 [rows, blocks].
        zero_points: uint8 or float32 [rows, blocks]; None: the middle code.
        bits: 2, 4 or 8 a code.
        block_size: weights that share a scale.
        columns: weights a row; the last block is filled up with zeros.
    """

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | npt.NDArray[np.float32] | None
    bits: int
    block_size: int
    columns: int

    @property
    def rows(self) -> int:
        """Outputs of the matrix."""
        return int(self.packed.shape[0])

    def packed_zero_points(self) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32] | None:
        """As MatMulNBits takes them: codes packed a row, uint8 [rows, bytes], or floats [rows * blocks]."""
        if self.zero_points is None or self.zero_points.dtype == np.float32:
            return None if self.zero_points is None else self.zero_points.reshape(-1)
        return pack(self.zero_points.astype(np.uint8, copy=False), self.bits)

    def dequantised(self) -> npt.NDArray[np.float32]:
        """The matrix that the device computes with, float32 [rows, columns]."""
        codes = unpack(self.packed, self.bits).astype(np.float32)  # [rows, blocks, block_size]
        zeros = np.float32(middle(self.bits)) if self.zero_points is None else self.zero_points[..., None]
        weights: npt.NDArray[np.float32] = (codes - zeros) * self.scales[..., None]
        return np.ascontiguousarray(weights.reshape(self.rows, -1)[:, : self.columns])


def middle(bits: int) -> int:
    """The code of weight 0 where no zero point is stored."""
    return 1 << (bits - 1)


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack along the last axis, lowest bits first; a last byte that is not full is filled with zeros.

    Args:
        codes: uint8 [..., count] below 2**bits.
        bits: a code.

    Returns:
        uint8 [..., ceil(count * bits / 8)].
    """
    in_byte = 8 // bits
    if codes.shape[-1] % in_byte:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % in_byte)])
    packed = codes[..., ::in_byte].copy()
    for place in range(1, in_byte):
        packed |= codes[..., place::in_byte] << np.uint8(bits * place)
    return packed


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack`: uint8 [..., bytes * 8 / bits]."""
    in_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * in_byte), np.uint8)
    for place in range(in_byte):
        codes[..., place::in_byte] = (packed >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1)
    return codes


def storable(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to float16 where float16 is exact enough; others stay as they are."""
    half = scale.half().float()
    return torch.where((half - scale).abs() <= SCALE_ERROR * scale.abs(), half, scale)


def fits_float16(scales: npt.NDArray[np.float32]) -> bool:
    """Whether a matrix's scales may be stored as float16.

    A scale below float16's normal range loses digits; that is accepted where the loss is nothing beside the steps of
    the matrix's ordinary blocks, as in a table's unused rows.

    Args:
        scales: float32 [rows, blocks].
    """
    with np.errstate(over="ignore"):
        error = np.abs(scales.astype(np.float16).astype(np.float32) - scales)
    bound = SCALE_ERROR * np.maximum(np.abs(scales), np.median(np.abs(scales)))
    return bool((error <= bound).all())  # an overflow is infinitely wrong, and NaN is not small either


def codes_of(weights: torch.Tensor, grid: Grid, bits: int) -> torch.Tensor:
    """Nearest codes on a grid.

    Args:
        weights: float32 [rows, blocks, block_size].
        grid: of these blocks.
        bits: a code.

    Returns:
        float32 [rows, blocks, block_size], whole numbers.
    """
    zero: torch.Tensor | int = middle(bits) if grid.zero is None else grid.zero.unsqueeze(-1)
    return torch.round(weights / grid.scale.unsqueeze(-1) + zero).clamp_(0, 2**bits - 1)


def assemble(codes: torch.Tensor, grid: Grid, bits: int, columns: int) -> BlockWeights:
    """Pack codes and their grid.

    Args:
        codes: whole numbers [rows, blocks, block_size].
        grid: of these blocks.
        bits: a code.
        columns: weights a row that count.
    """
    zeros = None
    if grid.zero is not None:
        # Whole zero points are stored as codes; those of a method that leaves them between codes are stored as floats.
        whole = bool((grid.zero == grid.zero.round()).all())
        zeros = (grid.zero.to(torch.uint8) if whole else grid.zero).numpy()
    packed = pack(codes.to(torch.uint8).numpy(), bits)
    return BlockWeights(packed, grid.scale.numpy(), zeros, bits, int(codes.shape[-1]), columns)


def round_to_grid(weight: torch.Tensor, rule: GridRule, bits: int, block_size: int, *, symmetric: bool) -> BlockWeights:
    """Quantise a matrix block by block.

    Args:
        weight: float32 [rows, columns].
        rule: finds the grid.
        bits: a code.
        block_size: weights that share a scale.
        symmetric: whether every zero is the middle code.

    Returns:
        The packed matrix. Beside it only a few megabytes are held at a time.
    """
    rows, columns = weight.shape
    step = max(1, _WEIGHTS_AT_ONCE // columns)

    def part(at: int) -> BlockWeights:
        return _round_rows(weight[at : at + step], rule, bits, block_size, symmetric=symmetric)

    with _one_core_each(), ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(part, range(0, rows, step)))
    zeros = None
    if parts[0].zero_points is not None:
        # One dtype for all: a chunk whose float zeros happen to be whole must not turn the others into codes.
        stored = [part.zero_points for part in parts if part.zero_points is not None]
        zeros = np.concatenate(stored, dtype=np.result_type(*stored), casting="safe")
    packed = np.concatenate([part.packed for part in parts])
    scales = np.concatenate([part.scales for part in parts])
    return BlockWeights(packed, scales, zeros, bits, block_size, columns)


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """Chunks side by side, none of them divided further: torch's threads would wait for each other at every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _round_rows(weight: torch.Tensor, rule: GridRule, bits: int, block_size: int, *, symmetric: bool) -> BlockWeights:
    blocks = in_blocks(weight, block_size)
    found = rule(blocks, bits, symmetric)
    grid = Grid(storable(found.scale), found.zero)
    return assemble(codes_of(blocks, grid, bits), grid, bits, weight.shape[1])


def in_blocks(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """View or copy [rows, columns] as [rows, blocks, block_size], the last block filled up with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block_size)) if columns % block_size else weight
    return padded.reshape(rows, -1, block_size)
