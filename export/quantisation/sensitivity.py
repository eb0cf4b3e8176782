"""Which layers four bits hurt: measured on the task's own texts, one layer rounded at a time.

Folklore says "keep the head and the first layer". Here each group of matrices that share an input (query, key and
value; gate and up) is rounded alone, and the divergence of the answers is what it costs. Eight bits then go where they
buy the most divergence per byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from export.quantisation.matrices import Matrix, read_matrix, stored_matrices
from export.quantisation.probe import Floats, Probe, Text
from export.quantisation.quantize import QuantSettings, quantise_matrix
from export.quantisation.scoring import Scorer

Log = Callable[[str], None]
POSITIONS = 128
"""Scored positions: a hundred groups are to be ranked, not measured to the last digit."""
_EXTRA_BYTES_A_WEIGHT = 0.5


@dataclass(frozen=True)
class Sensitivity:
    """What one group of matrices costs.

    Args:
        layer: a name for people, such as ``layers.3.down_proj``.
        nodes: its MatMuls.
        kl_nats: mean divergence from fp32 with this group alone in four bits.
        extra_bytes: what eight bits would add to the file.
    """

    layer: str
    nodes: tuple[str, ...]
    kl_nats: float
    extra_bytes: int

    def as_dict(self, chosen: Sequence[str]) -> dict[str, Any]:
        """JSON form for the report card; ``int8`` is whether the group keeps eight bits."""
        return {
            "layer": self.layer,
            "kl_nats": round(self.kl_nats, 6),
            "extra_bytes": self.extra_bytes,
            "int8": all(node in chosen for node in self.nodes),
        }


def measure_sensitivity(
    model: ModelProto, texts: Sequence[Text], settings: QuantSettings, log: Log | None = None
) -> list[Sensitivity]:
    """Round every group of matrices alone and score the answers.

    Args:
        model: the fused fp32 graph; it is not changed.
        texts: token ids of prompts with their answers.
        settings: block size and grid. A calibrated method is measured by its grid alone: rounding to nearest.
        log: is told of every group.

    Returns:
        One entry a group, in order of evaluation.

    Raises:
        RefusedError: ``export.calibration_missing``.
    """
    probe = Probe(model)
    scorer = Scorer(probe, texts, "a sensitivity", POSITIONS)
    found = []
    for group in _groups(stored_matrices(model)):
        agreement = scorer.agreement(probe, {m.weight: _rounded(model, m, settings) for m in group})
        weights = sum(matrix.rows * matrix.columns for matrix in group)
        nodes = tuple(matrix.node for matrix in group)
        # Below zero is rounding of float32 sums: two equal distributions.
        entry = Sensitivity(_label(group), nodes, max(0.0, agreement.mean_kl), int(weights * _EXTRA_BYTES_A_WEIGHT))
        found.append(entry)
        if log is not None:
            log(f"{entry.layer}: {entry.kl_nats:.5f} nats in four bits")
    return found


def choose_int8(found: Sequence[Sensitivity], share: float) -> tuple[str, ...]:
    """The MatMuls that keep eight bits.

    Args:
        found: of `measure_sensitivity`.
        share: of all quantised weights, at most so many keep eight bits; 0 to 1.

    Returns:
        Names for `QuantSettings.int8_nodes`: groups by divergence per byte, as long as they fit.
    """
    left = share * sum(entry.extra_bytes for entry in found)
    chosen: list[str] = []
    for entry in sorted(found, key=lambda e: (-e.kl_nats / e.extra_bytes, e.layer)):
        if entry.extra_bytes <= left and entry.kl_nats > 0:
            left -= entry.extra_bytes
            chosen.extend(entry.nodes)
    return tuple(sorted(chosen))


def _rounded(model: ModelProto, matrix: Matrix, settings: QuantSettings) -> Floats:
    weights = quantise_matrix(read_matrix(model, matrix), settings).dequantised()  # [rows, columns]
    return np.ascontiguousarray(weights.T) if matrix.transposed else weights


def _groups(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices with the same input are quantised together or not at all."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.multiplied, []).append(matrix)
    return list(groups.values())


def _label(group: Sequence[Matrix]) -> str:
    if any(matrix.is_head for matrix in group):
        return "embedding and head" if group[0].is_tied else "head"
    weights = "+".join(matrix.weight for matrix in group)
    layer = re.search(r"layers\.(\d+)\.", weights)
    parts = dict.fromkeys(re.findall(r"(\w+)\.weight", weights))
    if layer is None or not parts:
        return group[0].node
    # Packed weights carry the whole path of each part; the last word is the part.
    return f"layers.{layer[1]}.{'+'.join(part.split('__')[-1] for part in parts)}"
