"""Which stages a request needs, in which order, and what each of them depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent.fs import sha256_file
from export.assembly import Parts
from export.boards import Board
from export.checkpoint.peft import LoraAdapter
from export.checkpoint.source import Checkpoint, open_checkpoint
from export.npu.portable import PORTABLE_NAME
from export.pipeline import Pipeline
from export.quantisation.quantize import QuantSettings
from export.quantisation.sweep import Judge
from export.request import BuildRequest, Labelled, Measurement
from export.stages.adapt import adapt, adapter_facts
from export.stages.fixed_shapes import chosen_soc, compiled_for, fix_shapes
from export.stages.fuse import fuse
from export.stages.layout import read_spec
from export.stages.prove import Candidate, prove
from export.stages.quantise import quantise, quantise_int8, sensitivity_facts
from export.stages.reference import portable_graph, reference
from export.stages.shrink import CHECKPOINT_DIR, shrink, shrink_key, shrinking_facts
from export.stages.specialise import Speciality, specialise
from export.stages.sweeping import chosen_settings, make_judge, sweep_facts, swept_sensitivity, try_all
from export.tasks import TaskFolder
from export.texts import TaskTexts


@dataclass(frozen=True)
class Given:
    """What was asked for, checked and read.

    Args:
        board: the target.
        checkpoint: the checkpoint.
        context_tokens: longest text.
        tasks: the bundle's tasks.
        labelled: labelled events by task.
        adapters: LoRA adapters by task.
    """

    board: Board
    checkpoint: Checkpoint
    context_tokens: int
    tasks: tuple[TaskFolder, ...]
    labelled: dict[str, Labelled]
    adapters: dict[str, LoraAdapter] = field(default_factory=dict)


class Chain:
    """The stages of one request, run on demand.

    Args:
        request: what to build.
        given: the same, checked and read.
        pipeline: where stages are kept.
    """

    def __init__(self, request: BuildRequest, given: Given, pipeline: Pipeline) -> None:
        self._request = request
        self._given = given
        self._pipeline = pipeline
        self._say = pipeline.progress
        self._findings: dict[str, Any] = {}
        # Content of all that tasks' texts are rendered from, for stages that look at them.
        self._texts_key = {
            "tasks": {name: file.read_text("utf-8") for task in given.tasks for name, file in task.files().items()},
            "labelled": data_hashes(request.measurement),
        }

    def model(self) -> Candidate:
        """Everything up to the model that would be shipped."""
        lineage = self._shrink()
        fused = self._fuse()
        adapted = self._adapt(fused)
        if self._given.board.source == "portable":
            special = self._fix_shapes()
        else:
            special = self._specialise(*self._quantise(fused), adapted)
        request, given = self._request, self._given
        soc = chosen_soc(given.board, request.soc)
        parts = Parts(
            identity=request.identity,
            checkpoint=given.checkpoint,
            tasks=given.tasks,
            model=special,
            minimum_onnxruntime=given.board.minimum_onnxruntime,
            quality=request.measurement.quality,
            findings=self._findings,
            lineage=lineage,
        )
        compiled = () if soc is None else (compiled_for(given.board, soc),)
        isotonic = request.measurement.isotonic
        full = adapted or fused
        return Candidate(parts, full, request.precision, given.board, request.elsewhere, compiled, isotonic)

    def prove(self, candidate: Candidate) -> Path:
        """What the model is worth."""
        inputs = {
            **self._texts_key,
            "identity": asdict(self._request.identity),
            "quality": self._request.measurement.quality,
            "isotonic": self._request.measurement.isotonic,
            "board": self._board_key(),
            "elsewhere": [" ".join(one.command) for one in self._request.elsewhere.interpreters(candidate.board)],
        }
        return self._pipeline.stage(
            "prove",
            inputs,
            lambda folder: prove(candidate, self._given.labelled, folder, self._say),
            after=("fuse", "specialise"),  # what *adapt* made has gone into the latter's key
        )

    def _shrink(self) -> tuple[dict[str, Any], ...]:
        """The rest of the chain works on the smaller checkpoint."""
        wanted, given = self._request.shrinking, self._given
        if wanted is None:
            return ()
        folder = self._pipeline.stage(
            "shrink",
            {**shrink_key(wanted, given.checkpoint), **self._texts_key},
            lambda folder: shrink(wanted, given.checkpoint, given.tasks, folder, self._say),
        )
        smaller = open_checkpoint(folder / CHECKPOINT_DIR)
        context_tokens = min(smaller.max_positions, given.context_tokens)
        self._given = replace(given, checkpoint=smaller, context_tokens=context_tokens)
        return (shrinking_facts(folder),)

    def _fuse(self) -> Path:
        checkpoint, context_tokens = self._given.checkpoint, self._given.context_tokens
        recorded = self._pipeline.stage(
            "reference", {"checkpoint": checkpoint.sha256}, lambda folder: reference(checkpoint, folder)
        )
        return self._pipeline.stage(
            "fuse",
            {"context_tokens": context_tokens},
            lambda folder: fuse(checkpoint, recorded, context_tokens, folder, self._say),
            after=("reference",),
        )

    def _adapt(self, fused: Path) -> Path | None:
        """The fp32 graph with its tasks' adapters, where there are any."""
        checkpoint, adapters = self._given.checkpoint, self._given.adapters
        if not adapters:
            return None
        folder = self._pipeline.stage(
            "adapt",
            {task: adapter.file_hashes for task, adapter in adapters.items()},
            lambda folder: adapt(checkpoint, adapters, fused, folder, self._say),
            after=("fuse",),
        )
        self._findings |= adapter_facts(folder)
        return folder

    def _quantise(self, fused: Path) -> tuple[Path, str]:
        """The quantised model and the stage that it came from."""
        if self._request.precision == "fp32":
            return fused, "fuse"
        settings, share = self._request.quantisation, self._request.int8_share
        if self._request.precision == "int8":
            return self._quantise_int8(fused, settings), "quantise"
        after: tuple[str, ...] = ("fuse",)
        if self._request.sweep_s is not None:
            swept = self._sweep(fused, self._request.sweep_s)
            settings, share, after = chosen_settings(swept), 0.0, ("fuse", "sweep")
            self._findings |= {"sweep": sweep_facts(swept), **swept_sensitivity(swept)}
        looks_at_texts = settings.needs_texts or share > 0
        folder = self._pipeline.stage(
            "quantise",
            {**asdict(settings), "int8_share": share, **(self._texts_key if looks_at_texts else {})},
            lambda folder: quantise(fused, settings, share, self._texts(), folder, self._say),
            after=after,
        )
        self._findings |= sensitivity_facts(folder)
        return folder, "quantise"

    def _quantise_int8(self, fused: Path, settings: QuantSettings) -> Path:
        return self._pipeline.stage(
            "quantise",
            {**asdict(settings), "precision": "int8", **(self._texts_key if settings.needs_texts else {})},
            lambda folder: quantise_int8(fused, settings, self._texts(), folder, self._say),
            after=("fuse",),
        )

    def _sweep(self, fused: Path, budget_s: float) -> Path:
        return self._pipeline.stage(
            "sweep",
            {"budget_s": budget_s, **self._texts_key},
            lambda folder: try_all(fused, self._texts(), self._judge(fused), budget_s, folder, self._say),
            after=("fuse",),
        )

    def _specialise(self, shipped: Path, upstream: str, adapted: Path | None) -> Path:
        speciality = self._speciality()
        return self._pipeline.stage(
            "specialise",
            {**self._texts_key, **self._request.graph.as_key(), "board": self._board_key()},
            lambda folder: specialise(speciality, shipped, folder, self._say, adapted),
            after=(upstream, *([] if adapted is None else ["adapt"])),
        )

    def _fix_shapes(self) -> Path:
        speciality, precision = self._speciality(), self._request.precision
        soc = chosen_soc(self._given.board, self._request.soc)
        checkpoint = self._given.checkpoint
        portable = self._pipeline.stage(
            "portable", {"checkpoint": checkpoint.sha256}, lambda folder: portable_graph(checkpoint, folder)
        )
        return self._pipeline.stage(
            "specialise",
            {
                **self._texts_key,
                "board": self._board_key(),
                "precision": precision,
                "soc": None if soc is None else soc.name,
            },
            lambda folder: fix_shapes(speciality, portable / PORTABLE_NAME, precision, soc, folder, self._say),
            after=("portable",),
        )

    def _judge(self, fused: Path) -> Judge | None:
        """Accuracy of a candidate, where the request brings labelled events."""
        for task in self._given.tasks:
            rows = self._given.labelled[task.spec.name].evaluate_on
            if rows:
                return make_judge(self._given.checkpoint, read_spec(fused), task.spec, rows)
        return None

    def _speciality(self) -> Speciality:
        given = self._given
        return Speciality(
            given.board, self._request.graph, given.checkpoint, given.tasks, self._texts(), given.adapters
        )

    def _texts(self) -> TaskTexts:
        return TaskTexts(self._given.checkpoint, self._given.tasks, self._given.labelled)

    def _board_key(self) -> dict[str, Any]:
        return self._given.board.model_dump(mode="json")


def data_hashes(measurement: Measurement) -> dict[str, str]:
    """Content of the labelled events."""
    named = {"calibrate": measurement.calibrate_on, "evaluate": measurement.evaluate_on}
    return {f"{use} {task}": sha256_file(file) for use, files in named.items() for task, file in files.items()}
