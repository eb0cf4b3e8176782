"""Methods, block sizes, symmetry and eight-bit layers tried side by side within a budget of time.

Every candidate is built, scored on the task's own texts against fp32 and timed by ONNX Runtime. The front holds those
that no other beats in size, divergence and speed at once; the knee is the one to take when nobody says otherwise.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

from export.graphs.graph import load_graph, save_graph
from export.proof.parity import Agreement
from export.quantisation.compact import compact_scales
from export.quantisation.matrices import stored_matrices
from export.quantisation.probe import THREADS, Probe, Text
from export.quantisation.quantize import BLOCK_SIZES, Method, QuantSettings, quantize_int4
from export.quantisation.scoring import MAX_POSITIONS, Scorer
from export.quantisation.sensitivity import POSITIONS, Sensitivity, choose_int8, measure_sensitivity

SWEEP_NAME = "sweep.json"
INT8_SHARES = (0.05, 0.25)
TIMED_ROUNDS = 3
TIMED_TOKENS = 16
SLOWEST_KNEE = 0.8
"""A candidate that decodes slower than this share of the fastest is no knee: speed was what INT4 was asked for."""

Log = Callable[[str], None]
Judge = Callable[[Path], float]
"""Share of labelled events that a graph, named by its file, answers right in every field."""


@dataclass(frozen=True)
class Candidate:
    """A combination to try.

    Args:
        settings: method, block size and symmetry.
        int8_share: share of the weights that may keep eight bits, chosen by sensitivity; 0: none.
    """

    settings: QuantSettings
    int8_share: float = 0.0

    @property
    def label(self) -> str:
        """What logs and the list of untried candidates call it."""
        share = f" with {self.int8_share:.0%} of the weights in eight bits" if self.int8_share else ""
        return f"{self.settings.label}{share}"


@dataclass(frozen=True)
class SweepRow:
    """What one candidate came to; the JSON of ``sweep.json``.

    Args:
        bytes: of the graph with its weights.
        label: precision, and the share of eight-bit weights that was asked for.
        accuracy: share of labelled events right in every field; None without a judge.
        decode_tok_per_s: median, one token a pass.
        prefill_tok_per_s: median, one prompt a pass.
        on_front: whether no other candidate is better in one respect without being worse in another.
        knee: whether it is the one to take.
        int8_nodes: MatMuls with eight bits, to repeat the build.
    """

    method: Method
    block_size: int
    symmetric: bool
    int8_share: float
    label: str
    bytes: int
    kl_nats: float
    top1: float
    perplexity_ratio: float
    accuracy: float | None
    decode_tok_per_s: float
    prefill_tok_per_s: float
    on_front: bool = False
    knee: bool = False
    int8_nodes: tuple[str, ...] = ()

    @property
    def settings(self) -> QuantSettings:
        """What builds this row's graph again."""
        return QuantSettings(self.method, self.block_size, self.symmetric, self.int8_nodes)


@dataclass(frozen=True)
class SweepResult:
    """Everything a sweep found.

    Args:
        rows: candidates that were tried, in order.
        untried: labels of those for which the time would not do.
        sensitivity: of the layers, where eight bits were tried.
    """

    rows: tuple[SweepRow, ...]
    untried: tuple[str, ...]
    sensitivity: tuple[Sensitivity, ...]

    @property
    def knee(self) -> SweepRow | None:
        """The row to take."""
        return next((row for row in self.rows if row.knee), None)


@dataclass(frozen=True)
class SweepInputs:
    """What candidates are built from and measured on.

    Args:
        graph: file of the fused fp32 graph.
        texts: prompts with their answers, to score and time on.
        calibration_ids: whole texts for calibrated methods; none: those methods are not tried.
        judge: measures accuracy, where labelled events are at hand.
        threads: intra-op threads.
    """

    graph: Path
    texts: Sequence[Text]
    calibration_ids: Sequence[Sequence[int]] = ()
    judge: Judge | None = None
    threads: int = THREADS


def candidates(*, calibrated: bool) -> list[Candidate]:
    """What is tried, in the order of how much is learnt from it.

    Args:
        calibrated: whether there are texts to calibrate on.
    """
    kinds: list[QuantSettings] = [QuantSettings("k_quant"), QuantSettings("rtn")]
    kinds += [QuantSettings("gptq")] if calibrated else []
    kinds += [QuantSettings(method, symmetric=False) for method in ("k_quant", "rtn", "hqq")]
    kinds += [QuantSettings("gptq", symmetric=False)] if calibrated else []
    whole = [Candidate(replace(kind, block_size=block)) for block, kind in product(BLOCK_SIZES, kinds)]
    best = kinds[2] if calibrated else kinds[0]
    mixed = [
        Candidate(replace(best, block_size=block), share) for share, block in product(INT8_SHARES, BLOCK_SIZES[:2])
    ]
    # Eight bits for a few layers are the other way to buy quality: right after one block size of everything.
    return [*whole[: len(kinds)], *mixed, *whole[len(kinds) :]]


def sweep(
    inputs: SweepInputs,
    folder: Path,
    budget_s: float,
    *,
    tried: Sequence[Candidate] | None = None,
    log: Log | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SweepResult:
    """Try candidates until the time is up.

    Args:
        inputs: graph, texts and judge.
        folder: receives ``sweep.json``, and the candidates' graphs for as long as they are timed.
        budget_s: seconds. A candidate is not started when the slowest one so far would not fit; the first always is.
        tried: the candidates; default: `candidates`.
        log: is told of every candidate.
        clock: seconds, for tests.

    Returns:
        The rows with front and knee marked, and what was not tried.

    Raises:
        RefusedError: ``export.calibration_missing`` without texts.
        EdgeError: what quantising raises.
    """
    say = log or (lambda _: None)
    run = _Sweep(inputs, folder, clock)
    deadline = clock() + budget_s
    left = list(candidates(calibrated=bool(inputs.calibration_ids)) if tried is None else tried)
    while left and run.fits(left[0], deadline):
        row = run.try_one(left.pop(0), say)
        say(f"{row.label}: {row.bytes:,} bytes, KL {row.kl_nats:.5f} nats, same top token {row.top1:.2%}")
    run.time_again(deadline)
    untried = tuple(candidate.label for candidate in left)
    if untried:
        say(f"not tried within {budget_s:.0f} s: {', '.join(untried)}")
    result = SweepResult(tuple(with_knee(run.rows())), untried, tuple(run.sensitivity))
    # Untried ones stand in the list, too, without figures: what a front was not chosen from must be seen.
    listed = [asdict(row) for row in result.rows] + [{"label": label, "bytes": None} for label in untried]
    (folder / SWEEP_NAME).write_text(json.dumps(listed, indent=2) + "\n", "utf-8")
    return result


def with_knee(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Mark the front and its knee.

    The front: rows that no other row matches in bytes, divergence and decode speed and beats in one of them. The knee:
    of the rows of the front that are fast enough (`SLOWEST_KNEE`), with size and divergence scaled to 0..1, the one
    farthest below the chord from the smallest (0, 1) to the most exact (1, 0); of equals, the more exact.
    """
    front = [row for row in rows if not any(_beats(other, row) for other in rows)]
    fastest = max((row.decode_tok_per_s for row in rows), default=0.0)
    eligible = [row for row in front if row.decode_tok_per_s >= SLOWEST_KNEE * fastest]
    knee = _knee(eligible) if eligible else None
    return [replace(row, on_front=row in front, knee=row is knee) for row in rows]


def _beats(one: SweepRow, other: SweepRow) -> bool:
    first = (one.bytes, one.kl_nats, -one.decode_tok_per_s)
    second = (other.bytes, other.kl_nats, -other.decode_tok_per_s)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _knee(rows: Sequence[SweepRow]) -> SweepRow:
    sizes, losses = [row.bytes for row in rows], [row.kl_nats for row in rows]
    width, height = max(sizes) - min(sizes) or 1, max(losses) - min(losses) or 1

    def above_corner(row: SweepRow) -> float:
        # On the chord this sum is 1; the distance below it grows as the sum falls.
        return (row.bytes - min(sizes)) / width + (row.kl_nats - min(losses)) / height

    return min(rows, key=lambda row: (round(above_corner(row), 6), row.kl_nats, row.bytes, row.label))


@dataclass
class _Tried:
    """A candidate and what was measured of it; speeds once a round."""

    candidate: Candidate
    settings: QuantSettings
    size: int
    agreement: Agreement
    accuracy: float | None
    path: Path
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    @property
    def row(self) -> SweepRow:
        return SweepRow(
            method=self.settings.method,
            block_size=self.settings.block_size,
            symmetric=self.settings.is_symmetric,
            int8_share=self.candidate.int8_share,
            label=self.settings.label + (f" ({self.candidate.int8_share:.0%})" if self.candidate.int8_share else ""),
            bytes=self.size,
            kl_nats=self.agreement.mean_kl,
            top1=self.agreement.same_top1 / self.agreement.positions,
            perplexity_ratio=self.agreement.perplexity_ratio,
            accuracy=self.accuracy,
            decode_tok_per_s=round(statistics.median(self.decode), 1),
            prefill_tok_per_s=round(statistics.median(self.prefill), 1),
            int8_nodes=self.settings.int8_nodes,
        )


class _Sweep:
    """A sweep under way."""

    def __init__(self, inputs: SweepInputs, folder: Path, clock: Callable[[], float]) -> None:
        self._inputs = inputs
        self._folder = folder
        self._clock = clock
        self._tried: list[_Tried] = []
        self._slowest_s: dict[str, float] = {}
        self.sensitivity: list[Sensitivity] = []
        folder.mkdir(parents=True, exist_ok=True)
        reference = load_graph(inputs.graph)
        started = clock()
        self._scorer = Scorer(Probe(reference, threads=inputs.threads), inputs.texts, "a sweep")
        # A sensitivity scores every group of matrices once, at fewer positions.
        groups = len({matrix.multiplied for matrix in stored_matrices(reference)})
        self._sensitivity_s = (clock() - started) * groups * POSITIONS / MAX_POSITIONS

    def fits(self, candidate: Candidate, deadline: float) -> bool:
        """Whether the time will do, judged by the slowest candidate of the method so far, or of any method."""
        if not self._tried:
            return True
        known_s = self._slowest_s.get(candidate.settings.method, max(self._slowest_s.values()))
        first_s = self._sensitivity_s if candidate.int8_share and not self.sensitivity else 0.0
        return self._clock() + known_s + first_s <= deadline

    def try_one(self, candidate: Candidate, log: Log) -> SweepRow:
        """Build, score and time once."""
        settings = self._with_int8(candidate, log)
        started = self._clock()
        model = load_graph(self._inputs.graph)
        model = quantize_int4(model, settings, calibration_ids=self._inputs.calibration_ids)
        compact_scales(model)
        path = self._folder / f"candidate-{len(self._tried)}" / "decoder.onnx"
        size = sum(file.stat().st_size for file in save_graph(model, path))
        probe = Probe(model, exchangeable=False, threads=self._inputs.threads)
        agreement = self._scorer.agreement(probe)
        accuracy = self._inputs.judge(path) if self._inputs.judge else None
        tried = _Tried(candidate, settings, size, agreement, accuracy, path)
        self._time(tried, probe)
        self._tried.append(tried)
        took_s = self._clock() - started
        self._slowest_s[settings.method] = max(took_s, self._slowest_s.get(settings.method, 0.0))
        return tried.row

    def time_again(self, deadline: float) -> None:
        """Further rounds over all candidates in turn, so that a busy minute does not hit one of them alone."""
        for tried in [tried for _ in range(TIMED_ROUNDS - 1) for tried in self._tried]:
            if self._clock() >= deadline:
                break
            self._time(tried, Probe(load_graph(tried.path), exchangeable=False, threads=self._inputs.threads))

    def rows(self) -> list[SweepRow]:
        """What was found; the candidates' graphs are deleted."""
        for tried in self._tried:
            shutil.rmtree(tried.path.parent)
        return [tried.row for tried in self._tried]

    def _with_int8(self, candidate: Candidate, log: Log) -> QuantSettings:
        if not candidate.int8_share:
            return candidate.settings
        if not self.sensitivity:
            reference = load_graph(self._inputs.graph)
            self.sensitivity = measure_sensitivity(reference, self._inputs.texts, candidate.settings, log)
        return replace(candidate.settings, int8_nodes=choose_int8(self.sensitivity, candidate.int8_share))

    def _time(self, tried: _Tried, probe: Probe) -> None:
        prompt = max((list(prompt) for prompt, _ in self._inputs.texts), key=len)
        past = probe.prefill(prompt, probe.start())  # the first pass warms up
        started = self._clock()
        probe.prefill(prompt, probe.start())
        between = self._clock()
        for _ in range(TIMED_TOKENS):
            probe.run(prompt[:1], past, [0])
        ended = self._clock()
        tried.prefill.append(len(prompt) / max(1e-9, between - started))
        tried.decode.append(TIMED_TOKENS / max(1e-9, ended - between))
