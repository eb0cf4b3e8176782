"""The sweep: what it finds, which it picks, and that it never takes more time than it was given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.errors import RefusedError
from export.checkpoint.source import open_checkpoint
from export.graphs.graph import build_fp32, save_graph
from export.quantisation.quantize import QuantSettings
from export.quantisation.sweep import (
    SWEEP_NAME,
    Candidate,
    SweepInputs,
    SweepRow,
    candidates,
    sweep,
    with_knee,
)
from tests.export.test_quantize import TEXTS, WHOLE_TEXTS

FEW = (
    Candidate(QuantSettings("rtn", 128)),
    Candidate(QuantSettings("rtn", 32)),
    Candidate(QuantSettings("k_quant", 32), int8_share=0.5),
)


class SteppingClock:
    """A second passes at every look."""

    def __init__(self, step_s: float = 1.0) -> None:
        self.now_s = 0.0
        self._step_s = step_s

    def __call__(self) -> float:
        self.now_s += self._step_s
        return self.now_s


@pytest.fixture(scope="module")
def graph(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "decoder.onnx"
    save_graph(build_fp32(open_checkpoint(llama), 128), path)
    return path


def test_every_candidate_is_measured_and_its_graph_removed(graph: Path, tmp_path: Path) -> None:
    judged: list[Path] = []

    def judge(path: Path) -> float:
        assert path.is_file()
        judged.append(path)
        return 0.5

    inputs = SweepInputs(graph, TEXTS, judge=judge)
    result = sweep(inputs, tmp_path, budget_s=600, tried=FEW)
    assert len(judged) == len(result.rows) == 3
    coarse, fine, mixed = result.rows
    assert coarse.bytes < fine.bytes < mixed.bytes
    assert coarse.kl_nats > fine.kl_nats > mixed.kl_nats
    assert mixed.int8_nodes
    assert mixed.accuracy == 0.5
    assert min(row.decode_tok_per_s for row in result.rows) > 0
    assert result.knee is not None
    assert [row.settings.label for row in result.rows[:2]] == [candidate.settings.label for candidate in FEW[:2]]
    assert mixed.settings == QuantSettings("k_quant", 32, symmetric=True, int8_nodes=mixed.int8_nodes)
    assert [path.name for path in tmp_path.iterdir()] == [SWEEP_NAME]
    listed = json.loads((tmp_path / SWEEP_NAME).read_text("utf-8"))
    assert [row["label"] for row in listed] == [row.label for row in result.rows]
    assert {entry.layer for entry in result.sensitivity} >= {"layers.0.down_proj", "embedding and head"}


def test_candidate_that_would_not_fit_is_not_started_but_listed(graph: Path, tmp_path: Path) -> None:
    # By this clock a candidate takes at least four seconds: begin, twice in the timing, end.
    result = sweep(SweepInputs(graph, TEXTS), tmp_path, budget_s=9.0, tried=FEW, clock=SteppingClock())
    assert [row.label for row in result.rows] == ["int4-rtn-128"]
    assert len(result.untried) == 2
    listed = json.loads((tmp_path / SWEEP_NAME).read_text("utf-8"))
    assert [row["label"] for row in listed if row["bytes"] is None] == list(result.untried)


def test_time_of_the_sensitivity_counts_before_eight_bits_are_tried(graph: Path, tmp_path: Path) -> None:
    # Until 16 s the third candidate would end, by this clock; the nine groups of a sensitivity take three more.
    result = sweep(SweepInputs(graph, TEXTS), tmp_path, budget_s=17.0, tried=FEW, clock=SteppingClock())
    assert [row.label for row in result.rows] == ["int4-rtn-128", "int4-rtn-32"]
    plain = (*FEW[:2], Candidate(QuantSettings("k_quant", 32)))
    same = sweep(SweepInputs(graph, TEXTS), tmp_path, budget_s=17.0, tried=plain, clock=SteppingClock())
    assert len(same.rows) == 3


def test_sweep_without_texts_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        sweep(SweepInputs(graph, []), tmp_path, budget_s=60)
    assert caught.value.code == "export.calibration_missing"


def test_calibrated_candidate_is_built_on_the_texts(graph: Path, tmp_path: Path) -> None:
    tried = [Candidate(QuantSettings("gptq", 64))]
    result = sweep(SweepInputs(graph, TEXTS, WHOLE_TEXTS), tmp_path, budget_s=60, tried=tried)
    assert [row.method for row in result.rows] == ["gptq"]


def test_no_combination_is_listed_twice_and_calibrated_ones_need_texts() -> None:
    for calibrated in (True, False):
        listed = candidates(calibrated=calibrated)
        assert len(set(listed)) == len(listed)
        assert any(entry.settings.needs_texts for entry in listed) is calibrated
        kinds = {(e.settings.method, e.settings.block_size, e.settings.is_symmetric) for e in listed}
        for method, symmetric in (("rtn", True), ("rtn", False), ("k_quant", True), ("k_quant", False), ("hqq", False)):
            assert {(method, block, symmetric) for block in (32, 64, 128)} <= kinds


def row(label: str, size: int, kl_nats: float, speed: float = 100.0) -> SweepRow:
    return SweepRow("rtn", 32, True, 0.0, label, size, kl_nats, 0.9, 1.0, None, speed, 1000.0)


def test_front_leaves_out_what_another_beats_in_everything() -> None:
    rows = [row("best", 10, 0.1), row("worse", 11, 0.2), row("exact", 20, 0.01), row("fast", 30, 0.3, 150.0)]
    assert [r.label for r in with_knee(rows) if r.on_front] == ["best", "exact", "fast"]


def test_knee_bends_farthest_from_the_chord() -> None:
    rows = [row("small", 10, 1.0), row("bend", 12, 0.1), row("exact", 20, 0.0), row("flat", 16, 0.09)]
    assert [r.label for r in with_knee(rows) if r.knee] == ["bend"]


def test_knee_is_not_slow() -> None:
    rows = [row("small", 10, 1.0), row("bend", 12, 0.1, speed=50.0), row("exact", 20, 0.0)]
    assert [r.label for r in with_knee(rows) if r.knee] == ["exact"]


def test_equal_rows_stay_on_the_front_together_and_one_is_the_knee() -> None:
    rows = with_knee([row("a", 10, 0.1), replace(row("a", 10, 0.1), label="b")])
    assert [r.on_front for r in rows] == [True, True]
    assert [r.knee for r in rows] == [True, False]


def test_nothing_tried_has_no_knee() -> None:
    assert with_knee([]) == []
