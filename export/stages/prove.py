"""Stage *prove*: what the specialised model is worth, measured with the device's own engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime

from edge_agent.contract.manifest import Target
from edge_agent.runtime.adapter import task_adapter
from export.assembly import Parts, assemble
from export.boards import Board
from export.checkpoint.source import TOKENIZER_NAME
from export.pipeline import Progress
from export.proof.calibrate import CALIBRATION_NAME
from export.proof.evaluate import evaluate
from export.proof.evidence import Evidence, verification
from export.proof.greedy import GreedyDecoder, StepModel
from export.proof.measure import THREADS, bundle_backend, read_calibration
from export.proof.parity import Agreement, between_all
from export.proof.testimony import retarget
from export.request import Labelled
from export.stages.calibrating import choose_floors, fit
from export.stages.layout import PROOF_NAME, link_or_copy, read_spec
from export.stages.witnesses import Elsewhere, gather_evidence
from export.tasks import TaskFolder
from export.texts import TaskTexts

HOST: Target = "cpu-x86_64"
"""The target whose provider every machine has."""


@dataclass(frozen=True)
class Candidate:
    """What is to be proven.

    Args:
        parts: the bundle's ingredients, without calibration and report card.
        full: folder of the same model in fp32, laid out like ``parts.model``; the yardstick.
        precision: name of the candidate's precision in figures: ``int4``, ``fp32``.
        board: the target.
        elsewhere: who else can answer the golden examples.
        compiled: that a vendor's compiler took the graphs.
        isotonic: whether a line may straighten confidences where one temperature does not.
    """

    parts: Parts
    full: Path
    precision: str
    board: Board
    elsewhere: Elsewhere
    compiled: tuple[Evidence, ...] = ()
    isotonic: bool = False

    @property
    def is_static(self) -> bool:
        """Whether its graphs have fixed shapes, which only the engine can feed."""
        return read_spec(self.parts.model).graph_interface == 2


def prove(candidate: Candidate, labelled: Mapping[str, Labelled], folder: Path, progress: Progress) -> None:
    """Measure.

    Args:
        candidate: the model.
        labelled: labelled events by task.
        folder: receives ``proof.json`` and ``tasks/<task>/calibration.json``.
        progress: is told the figures.

    Raises:
        RefusedError: ``export.golden_failed``: every device would refuse this bundle.
    """
    proof: dict[str, Any] = {"parity": _parity(candidate, progress)}
    _calibrate(candidate, labelled, folder, progress)
    with _looked_at(candidate.parts, calibration_texts(folder)) as bundle:
        proof["quality"] = _quality(candidate, bundle, folder, labelled, progress)
        evidence = [*candidate.compiled]
        evidence += gather_evidence(candidate.board, bundle, candidate.elsewhere, progress)
        proof["evidence"] = [{**one.as_dict(), "word": verification(candidate.board, one)} for one in evidence]
        proof["verification"] = verification(candidate.board, *evidence)
    (folder / PROOF_NAME).write_text(json.dumps(proof, indent=2, sort_keys=True) + "\n", "utf-8")


def _calibrate(candidate: Candidate, labelled: Mapping[str, Labelled], folder: Path, progress: Progress) -> None:
    asked = [(task.spec, labelled[task.spec.name].calibrate_on) for task in candidate.parts.tasks]
    # Every file first, with targets unmet: the engine loads all tasks, and refuses one that has no floor at all.
    isotonic = candidate.isotonic
    fitted = [
        fit(_oracle(candidate, task.name), task, rows, progress, isotonic=isotonic) for task, rows in asked if rows
    ]
    for one in fitted:
        one.write(folder)
    if not any(one.floors for one in fitted):
        return
    with _looked_at(candidate.parts, calibration_texts(folder)) as bundle, _runnable(candidate, bundle) as shipped:
        chosen = [choose_floors(one, lambda task: bundle_backend(shipped, task), progress) for one in fitted]
    for one in chosen:
        one.write(folder)


def calibration_texts(proven: Path) -> dict[str, bytes]:
    """The calibration files of this stage by their path inside a bundle."""
    files = sorted(proven.glob(f"tasks/*/{CALIBRATION_NAME}"))
    return {file.relative_to(proven).as_posix(): file.read_bytes() for file in files}


def _parity(candidate: Candidate, progress: Progress) -> dict[str, Any]:
    # The difference itself is left out: it depends on the machine, that it is small enough does not.
    parity: dict[str, Any] = {"fp32_matches_transformers": True}
    if candidate.precision != "fp32" and not candidate.is_static:
        agreement = _agreement(candidate)
        parity[f"{candidate.precision}_against_fp32"] = agreement.as_dict()
        progress.line(
            f"{candidate.precision} graph: same top token as fp32 at {agreement.same_top1} of "
            f"{agreement.positions} positions"
        )
    return parity


def _agreement(candidate: Candidate) -> Agreement:
    adapted = read_spec(candidate.parts.model).adapters or {}
    groups: dict[str | None, list[TaskFolder]] = {}
    for task in candidate.parts.tasks:
        groups.setdefault(task.spec.name if task.spec.name in adapted else None, []).append(task)
    return between_all(
        (
            _steps(candidate.full, name),
            _steps(candidate.parts.model, name),
            TaskTexts(candidate.parts.checkpoint, tasks).golden(),
        )
        for name, tasks in groups.items()
    )


def _quality(
    candidate: Candidate, bundle: Path, proven: Path, labelled: Mapping[str, Labelled], progress: Progress
) -> dict[str, dict[str, Any]]:
    quality: dict[str, dict[str, Any]] = {name: dict(by) for name, by in candidate.parts.quality.items()}
    measured = [task for task in candidate.parts.tasks if labelled[task.spec.name].evaluate_on]
    if not measured:
        return quality
    fp32 = replace(candidate.parts, model=candidate.full, identity=replace(candidate.parts.identity, target=HOST))
    # Without a calibration of its own, but a task that asks for an error target is refused without floors.
    borrowed = {name: text for name, text in calibration_texts(proven).items() if json.loads(text).get("floors")}
    with _looked_at(fp32, borrowed) as yardstick, _runnable(candidate, bundle) as shipped:
        for task in measured:
            name, rows = task.spec.name, labelled[task.spec.name].evaluate_on
            for precision, place in {"fp32": yardstick, candidate.precision: shipped}.items():
                with bundle_backend(place, task.spec) as decide:
                    found = evaluate(decide, rows, task.spec, read_calibration(place, task.spec).floors)
                quality.setdefault(name, {})[precision] = found.as_dict()
                progress.line(f"{name}: {precision} right in every field for {found.exact:.2%} of {found.rows} events")
    return quality


@contextmanager
def _runnable(candidate: Candidate, bundle: Path) -> Iterator[Path]:
    """The bundle in a form that this machine can run: an accelerator's graph on the CPU, unless it is compiled."""
    if candidate.board.execution_provider in onnxruntime.get_available_providers() or candidate.compiled:
        yield bundle
        return
    with TemporaryDirectory(dir=bundle.parent, prefix=".look-", suffix=".partial") as scratch:
        yield retarget(bundle, HOST, Path(scratch))


@contextmanager
def _looked_at(parts: Parts, texts: Mapping[str, bytes]) -> Iterator[Path]:
    """A bundle without report card or signature, for this machine's eyes only."""
    with TemporaryDirectory(dir=parts.model.parent, prefix=".look-", suffix=".partial") as scratch:
        assemble(replace(parts, texts=texts), Path(scratch), link_or_copy)
        yield Path(scratch)


def _oracle(candidate: Candidate, task: str) -> GreedyDecoder:
    # Static graphs take other inputs than the oracle gives: the same model in fp32 stands in for them.
    model = candidate.full if candidate.is_static else candidate.parts.model
    spec = read_spec(model)
    tokenizer = candidate.parts.checkpoint.path / TOKENIZER_NAME
    return GreedyDecoder(model / spec.decoder, tokenizer, spec, THREADS, task_adapter(model, spec, task))


def _steps(model: Path, adapted_task: str | None) -> StepModel:
    spec = read_spec(model)
    adapter = task_adapter(model, spec, adapted_task) if adapted_task else None
    return StepModel(model / spec.decoder, spec, THREADS, adapter)
