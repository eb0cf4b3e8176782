"""From static fp32 graphs to an NPU's: calibrate on the task's texts, put into fixed point, compile for a chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.contract.manifest import ModelSpec
from edge_agent.runtime.static_session import StaticSession
from export.boards import Soc
from export.graphs.graph import load_graph, save_graph
from export.npu.qdq import Feeds, FixedPoint, observe, to_fixed_point
from export.npu.qnn import compile_graph
from export.stages.layout import MODEL_DIR

PRECISIONS = {how.precision: how for how in (FixedPoint(weight_bits=8), FixedPoint(weight_bits=4, block_size=32))}
"""Activations in 16 bits, weights in 8 or 4; a whole channel of 4-bit weights under one scale loses too much."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class StaticModel:
    """Static fp32 graphs on disk.

    Args:
        folder: holds the files that ``spec`` names.
        spec: as `export.npu.static_graph.build_windows` returns it.
    """

    folder: Path
    spec: ModelSpec


def calibration_feeds(static: StaticModel, texts: Sequence[Sequence[int]], threads: int = 1) -> Iterator[Feeds]:
    """Inputs of the widest window, as the engine feeds it: with the past that the text before has left.

    Args:
        static: the fp32 graphs.
        texts: token ids of whole texts (prefix, event, answer); cut at the past window's end.
        threads: intra-op threads.

    Yields:
        Inputs of one pass, to be used before the next is asked for.
    """
    session = StaticSession(static.folder, static.spec, "cpu-x86_64", threads)
    tokens = session.windows[-1].tokens
    cache = session.new_cache(session.past_tokens)
    for text in texts:
        cache.rewind(0)
        for start in range(0, min(len(text), session.past_tokens), tokens):
            piece = text[start : min(start + tokens, session.past_tokens)]
            yield cache.feeds(tokens, piece)
            cache.append(piece)


def quantise_windows(static: StaticModel, texts: Sequence[Sequence[int]], how: FixedPoint, folder: Path) -> StaticModel:
    """Put static graphs into fixed point.

    The widest window is observed, and all windows take its ranges: they hold the same tensors, and what one writes into
    the past the other reads.

    Args:
        static: the fp32 graphs.
        texts: token ids of whole texts to calibrate on.
        how: the weights; `PRECISIONS` has what targets offer.
        folder: receives the graphs.

    Returns:
        The graphs in fixed point; ONNX Runtime's CPU provider runs them too, which shows what the numbers alone cost.

    Raises:
        RefusedError: ``export.calibration_missing`` without texts.
    """
    windows = static.spec.windows or ()
    ranges = observe(load_graph(static.folder / static.spec.decoder), calibration_feeds(static, texts))
    for window in windows:
        model = to_fixed_point(load_graph(static.folder / window.graph), ranges, how)
        save_graph(model, folder / window.graph)
    return StaticModel(folder, replace(static.spec, precision=how.precision))


def compile_windows(fixed: StaticModel, soc: Soc, folder: Path, log: Log) -> StaticModel:
    """Compile graphs in fixed point for a Qualcomm chip.

    Args:
        fixed: of `quantise_windows`.
        soc: the chip.
        folder: receives the compiled graphs.
        log: is told each graph's size.

    Returns:
        The compiled graphs.

    Raises:
        PermanentError: ``export.npu_missing``, ``export.npu_failed`` or ``export.npu_unsupported``.
    """
    (folder / MODEL_DIR).mkdir(parents=True, exist_ok=True)
    for window in fixed.spec.windows or ():
        compile_graph(fixed.folder / window.graph, soc, folder / window.graph)
        size = (folder / window.graph).stat().st_size
        log(f"{soc.name}: window of {window.tokens} tokens compiled whole, {size:,} bytes")
    return StaticModel(folder, fixed.spec)
