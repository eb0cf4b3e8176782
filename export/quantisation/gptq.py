"""Rounding that knows what the weights are multiplied with: GPTQ on the task's own texts.

A row of weights is rounded column by column, and what each rounding does wrong is made good by the columns that are
still free, weighed by how the inputs vary together. Inputs are gathered from the fp32 graph over rendered prompts and
answers of the task: a small model has few bits to spare, and they are spent on the plant's sentences.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from onnx import ModelProto

from edge_agent.errors import PermanentError
from export.quantisation.block_weights import (
    BlockWeights,
    Grid,
    GridRule,
    assemble,
    codes_of,
    in_blocks,
    middle,
    storable,
)
from export.quantisation.matrices import stored_matrices
from export.quantisation.probe import Floats, Probe, common_prefix, require_texts

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean: how far inputs that were never seen are provided for."""
HESSIANS_AT_ONCE_BYTES = 1536 << 20
MAX_CALIBRATION_TOKENS = 4096
"""Tokens behind the common prefix: beyond that the sums change little, and a 0.5B model takes 10 ms a token."""
_COLUMNS_AT_ONCE = 128
_MAX_DAMPING = 1.0


def hessians(
    model: ModelProto, texts: Sequence[Sequence[int]], budget_bytes: int = HESSIANS_AT_ONCE_BYTES
) -> Iterator[dict[str, torch.Tensor]]:
    """Gather X^T X of the input of every MatMul, some tensors at a time.

    Args:
        model: the fused fp32 graph.
        texts: token ids of prompts with their answers. What all have in common is run once and counted once: the
            device caches it, too.
        budget_bytes: what the matrices of one turn may take; each turn runs all texts again.

    Yields:
        Name of the input tensor -> float32 [columns, columns], divided by the number of tokens.

    Raises:
        RefusedError: ``export.calibration_missing``.
    """
    texts = _within(texts, MAX_CALIBRATION_TOKENS)
    widths = {matrix.multiplied: matrix.columns for matrix in stored_matrices(model)}
    for names in _turns(widths, budget_bytes):
        yield _gather(Probe(model, names, scores=False), texts, {name: widths[name] for name in names})


def gptq_round(
    weight: torch.Tensor, hessian: torch.Tensor, rule: GridRule, bits: int, block_size: int, *, symmetric: bool
) -> BlockWeights:
    """Quantise one matrix.

    Args:
        weight: float32 [rows, columns].
        hessian: X^T X of its inputs, float32 [columns, columns]; scale does not matter.
        rule: lays the grid of a block, on the weights as they are when its turn comes.
        bits: a code.
        block_size: weights that share a scale; a divisor of 128.
        symmetric: whether every zero is the middle code.

    Raises:
        PermanentError: ``export.quantize_failed`` when the Hessian cannot be inverted.
    """
    rows, columns = weight.shape
    inverse = _inverse_factor(hessian)  # upper triangular [columns, columns]
    free = weight.t().contiguous()  # [columns, rows]: a step touches whole rows of memory
    # What fills up a last block is multiplied with nothing.
    codes = torch.zeros((rows, -(-columns // block_size), block_size), dtype=torch.uint8)
    flat = codes.view(rows, -1)
    grids: list[Grid] = []
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        part, factor = free[start:stop], inverse[start:stop, start:stop]
        errors = torch.empty_like(part)
        for first in range(0, stop - start, block_size):
            # Laid on the weights as they are now, after the corrections that earlier columns asked for.
            found = rule(in_blocks(part[first : first + block_size].t(), block_size), bits, symmetric)
            grid = Grid(storable(found.scale), found.zero)  # of [rows, 1 block]
            zero = float(middle(bits)) if grid.zero is None else grid.zero.view(-1)
            for at in range(first, min(first + block_size, stop - start)):
                code = codes_of(part[at].view(rows, 1, 1), grid, bits).view(rows)
                flat[:, start + at] = code.to(torch.uint8)
                errors[at] = (part[at] - (code - zero) * grid.scale.view(rows)) / factor[at, at]
                # Only columns to come: those before are done.
                part[at + 1 :].addr_(factor[at, at + 1 :], errors[at], alpha=-1)
            grids.append(grid)
        free[stop:].addmm_(inverse[start:stop, stop:].t(), errors, alpha=-1)
    zeros = None if symmetric else torch.cat([grid.zero for grid in grids if grid.zero is not None], dim=1)
    return assemble(codes, Grid(torch.cat([grid.scale for grid in grids], dim=1), zeros), bits, columns)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; more damping where that much does not do."""
    diagonal = hessian.diagonal().mean().clamp(min=1e-12)
    damping = DAMPING
    while damping <= _MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * diagonal)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                result: torch.Tensor = upper
                return result
        damping *= 10
    raise PermanentError("export.quantize_failed", "the inputs of a matrix hold no usable numbers")


def _within(texts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """As many whole texts as hold ``tokens`` beside what all have in common."""
    filled = [list(text) for text in texts if text]
    require_texts(filled, "GPTQ")
    shared = len(common_prefix(filled))
    kept: list[list[int]] = []
    for text in filled:
        if kept and len(text) - shared > tokens:
            continue
        kept.append(text)
        tokens -= len(text) - shared
    return kept


def _turns(widths: dict[str, int], budget_bytes: int) -> Iterator[list[str]]:
    turn: list[str] = []
    left = budget_bytes
    for name, columns in widths.items():
        if turn and 4 * columns * columns > left:
            yield turn
            turn, left = [], budget_bytes
        turn.append(name)
        left -= 4 * columns * columns
    yield turn


def _gather(probe: Probe, texts: Sequence[Sequence[int]], widths: dict[str, int]) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(columns, columns) for name, columns in widths.items()}
    prefix = common_prefix(texts)
    past = probe.start()
    tokens = len(prefix)
    if prefix:
        _add(sums, probe.run(prefix, past, range(len(prefix))))
        past = probe.prefill(prefix, past)
    for text in texts:
        rest = text[len(prefix) :]
        _add(sums, probe.run(rest, past, range(len(rest))))
        tokens += len(rest)
    for total in sums.values():
        total.div_(tokens)
    return sums


def _add(sums: dict[str, torch.Tensor], seen: dict[str, Floats]) -> None:
    for name, total in sums.items():
        inputs = torch.from_numpy(seen[name]).view(-1, total.shape[0])  # [tokens, columns]
        total.addmm_(inputs.t(), inputs)
