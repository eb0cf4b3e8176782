"""What INT4 costs the reference model on events that it was not trained on, and how large it is beside its GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.bench.cache import ROOT
from tests.bench.figures import RATIO, Figure, Target
from tests.bench.made import HELDOUT, REFERENCE, build_bundle, gguf_peer, graph_bytes, python_module
from tests.bench.measured_run import CommandFailedError, run_measured

LOSS = Target(0.5, "lower")
_BUNDLE = REFERENCE / "bundle"
_CHECKPOINT = REFERENCE / "checkpoint"


def reference_figures(events: int | None = None) -> Iterator[Figure]:
    """Measure the committed bundle beside the same checkpoint in fp32, both with the device's engine.

    Args:
        events: how many of the held-out events, None for all.

    Yields:
        The largest loss of accuracy over the fields, in points, and sizes.
    """
    key, label = "reference.int4_loss", "reference model: accuracy lost to INT4, worst field"
    try:
        fp32 = build_bundle(_CHECKPOINT, "reference-fp32", ["--precision", "fp32"])
        before, after = _accuracy(fp32.bundle, events), _accuracy(_BUNDLE, events)
    except CommandFailedError as error:
        yield Figure(key, label, None, "points", LOSS, note=str(error).splitlines()[-1])
    else:
        yield loss_figure(key, label, before, after)
    gguf = gguf_peer("reference", _CHECKPOINT)
    yield Figure(
        "reference.size_ratio",
        "reference model: INT4 / Q4_0 --pure, both without the tokenizer",
        graph_bytes(_BUNDLE) / gguf.tensor_bytes,
        RATIO,
        note="of a model this small the graph's own nodes and tables are a sensible part",
    )


def loss_figure(key: str, label: str, before: Mapping[str, float], after: Mapping[str, float]) -> Figure:
    """The field that lost most.

    Args:
        key: of the figure.
        label: of the figure.
        before: share of right answers by field, fp32.
        after: the same, INT4.

    Returns:
        The largest loss in points, with the span over the fields; a gain is a negative loss.
    """
    losses = {name: 100 * (before[name] - after[name]) for name in before}
    note = "lost by field: " + ", ".join(f"{name} {loss:+.1f}" for name, loss in losses.items())
    return Figure(key, label, max(losses.values()), "points", LOSS, (min(losses.values()), max(losses.values())), note)


def _accuracy(bundle: Path, events: int | None) -> dict[str, float]:
    command = python_module("export", "eval", bundle, "--data", HELDOUT, "--json")
    limit = [] if events is None else ["--limit", str(events)]
    accuracy: dict[str, float] = json.loads(run_measured([*command, *limit], cwd=ROOT).stdout)["accuracy"]
    return accuracy
