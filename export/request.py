"""What a build is asked for: everything that decides a bundle's bytes, and what it may use to prove them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from edge_agent.contract.manifest import Name
from edge_agent.contract.task import GoldenExample
from edge_agent.contract.thresholds import error_targets
from edge_agent.errors import PermanentError, RefusedError
from edge_agent.fs import sha256_file
from export.boards import Board, Precision
from export.proof.evaluate import read_labelled
from export.quantisation.quantize import QuantSettings
from export.stages.witnesses import Elsewhere
from export.tasks import TaskFolder

_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True)
class Identity:
    """What the bundle is called, and for which target it is made."""

    name: str
    version: str
    target: str

    def check(self) -> None:
        """Refuse what no path or topic could carry, before any work begins.

        Raises:
            RefusedError: ``export.name_invalid``.
        """
        for what, value in (("name", self.name), ("version", self.version)):
            try:
                _NAME.validate_python(value)
            except ValidationError as error:
                raise RefusedError("export.name_invalid", f"{what} {value!r}: {error.errors()[0]['msg']}") from error


@dataclass(frozen=True)
class Measurement:
    """Labelled events by task name, and figures that were measured before.

    Args:
        calibrate_on: events to fit temperatures on, and to choose floors on where the task asks for error targets.
        evaluate_on: events to measure accuracy on, every precision.
        quality: task -> precision -> figures of `export.proof.evaluate.Quality`, taken as they are.
        isotonic: whether a line may straighten confidences where one temperature does not.
    """

    calibrate_on: dict[str, Path] = field(default_factory=dict)
    evaluate_on: dict[str, Path] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    isotonic: bool = False


@dataclass(frozen=True)
class Labelled:
    """Labelled events of one task."""

    calibrate_on: list[GoldenExample]
    evaluate_on: list[GoldenExample]


@dataclass(frozen=True)
class GraphOptions:
    """How the graph is cut for those who will run it.

    Args:
        vocabulary: the domain's texts, of which the head keeps the tokens; empty: the head keeps all.
        vocab_rows: tokens that a pruned head keeps.
        rare_rows: how the table's rows of all other tokens are stored; ``int2`` is coarse and small.
        vocab_heldout: texts of the domain on which the pruned head's reach is measured.
        kv: element type of the caches.
        head: inside the decoder's graph, or a graph of its own.
        together: whether several events may share a pass, and several positions of a text be scored in one; None:
            where the target can.
    """

    vocabulary: tuple[Path, ...] = ()
    vocab_rows: int = 8192
    rare_rows: Literal["int4", "int2"] = "int4"
    vocab_heldout: tuple[Path, ...] = ()
    kv: Literal["float32", "int8"] = "float32"
    head: Literal["attached", "split"] = "attached"
    together: bool | None = None

    def as_key(self) -> dict[str, Any]:
        """What the graph depends on: content of files, not their names."""
        texts = {name: [sha256_file(file) for file in getattr(self, name)] for name in ("vocabulary", "vocab_heldout")}
        plain = {name: getattr(self, name) for name in ("vocab_rows", "rare_rows", "kv", "head", "together")}
        return {**texts, **plain}


@dataclass(frozen=True)
class Shrinking:
    """A smaller checkpoint before everything else.

    Args:
        data: JSON lines of events of the bundle's one task, with decisions or without.
        drop_layers: layers to take out; 0 for none.
        distil_into: shape of a student (a name or a JSON file); None for none.
        minutes: of training.
        steps: of training instead, exactly.
    """

    data: Path
    drop_layers: int = 0
    distil_into: str | None = None
    minutes: float | None = 10.0
    steps: int | None = None


@dataclass(frozen=True)
class BuildRequest:
    """Everything that decides a bundle's bytes.

    Args:
        checkpoint: folder of the Hugging Face checkpoint.
        tasks: task folders.
        identity: name, version and target.
        precision: of the weights.
        quantisation: method, block size and exceptions, for INT4; of int8 it is embedding and head that are INT4.
        int8_share: share of the weights that may keep eight bits, chosen by measured sensitivity.
        sweep_s: seconds to try combinations for, whose knee is taken in place of ``quantisation``; None: no sweep.
        soc: the chip to compile for; None: the target's first.
        allow_large: whether more parameters than a small model has are welcome.
        trust: whether pickled weights are welcome (read without running them).
        shrinking: a smaller checkpoint first.
        graph: how the graph is cut.
        max_context_tokens: longest text; rotary tables are cut to it.
        measurement: labelled events and figures.
        elsewhere: interpreters of other machines that prove the bundle.
        adapters: folders of LoRA adapters, as PEFT writes them, by task.
    """

    checkpoint: Path
    tasks: tuple[Path, ...]
    identity: Identity
    precision: Precision = "int4"
    quantisation: QuantSettings = field(default_factory=QuantSettings)
    int8_share: float = 0.0
    sweep_s: float | None = None
    soc: str | None = None
    allow_large: bool = False
    trust: bool = False
    shrinking: Shrinking | None = None
    graph: GraphOptions = field(default_factory=GraphOptions)
    max_context_tokens: int = 2048
    measurement: Measurement = field(default_factory=Measurement)
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    adapters: Mapping[str, Path] = field(default_factory=dict)


def check_options(request: BuildRequest, board: Board) -> None:
    """Refuse what contradicts itself or the target, before any file is opened.

    Raises:
        RefusedError: ``export.usage``, ``export.precision_unsupported`` or ``export.option_unsuitable``.
        PermanentError: ``export.data_unreadable`` for a text that is not there.
    """
    board.check_precision(request.precision)
    if not 0 <= request.int8_share <= 1:
        raise RefusedError("export.usage", f"--int8-share is a share from 0 to 1, not {request.int8_share:g}")
    if request.sweep_s is not None and not request.sweep_s > 0:
        raise RefusedError("export.usage", f"--sweep takes seconds above zero, not {request.sweep_s:g}")
    if request.precision != "int4" and (request.sweep_s is not None or request.int8_share):
        raise RefusedError("export.option_unsuitable", f"--sweep and --int8-share need int4, not {request.precision}")
    if board.source == "portable" and request.graph != GraphOptions():
        raise RefusedError(
            "export.option_unsuitable", f"{board.name} has static graphs: no pruned or split head, no other caches"
        )
    if request.measurement.isotonic and not request.measurement.calibrate_on:
        raise RefusedError("export.usage", "--isotonic needs --calibrate-on: a line is drawn through labelled events")
    if request.adapters:
        _check_adapters(request, board)
    for file in (*request.graph.vocabulary, *request.graph.vocab_heldout):
        if not file.is_file():
            raise PermanentError("export.data_unreadable", f"cannot read {file}: no such file")


def _check_adapters(request: BuildRequest, board: Board) -> None:
    """Refuse what measures the shared weights and would be wrong for a task that adds to them."""
    unsuitable = {
        f"{board.name} has static graphs, which take no adapter": board.source == "portable",
        f"{board.name} computes in float16, whose range was measured without adapters": board.activations == "float16",
        "--kv int8 scales caches by what the shared weights bring forth": request.graph.kv == "int8",
        "--sweep scores the shared weights only": request.sweep_s is not None,
        "--precision int8 has projections that an adapter's product is not added to": request.precision == "int8",
        "--drop-layers and --distil-into change the weights that the adapter was trained on": request.shrinking
        is not None,
    }
    for reason, holds in unsuitable.items():
        if holds:
            raise RefusedError("export.option_unsuitable", f"--adapter: {reason}")


def read_quality(path: Path) -> dict[str, Any]:
    """Read figures for `Measurement.quality`.

    Raises:
        PermanentError: ``export.quality_invalid``.
    """
    try:
        parsed = json.loads(path.read_text("utf-8"))
        complete = all(set(f["accuracy"]) == set(f["ece"]) and f["rows"] for by in parsed.values() for f in by.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PermanentError("export.quality_invalid", f"{path}: {error}") from error
    if not complete:
        raise PermanentError("export.quality_invalid", f"{path}: accuracy, ece and rows are needed")
    result: dict[str, Any] = parsed
    return result


def read_all_labelled(measurement: Measurement, tasks: list[TaskFolder]) -> dict[str, Labelled]:
    """Read all labelled events before the long work begins.

    Raises:
        RefusedError: ``export.task_unknown``, ``export.target_unlabelled`` or ``export.data_repeated``.
        PermanentError: ``export.data_*``.
    """
    known = {task.spec.name for task in tasks}
    for name in {*measurement.calibrate_on, *measurement.evaluate_on, *measurement.quality}:
        if name not in known:
            raise RefusedError("export.task_unknown", f"no task {name!r} among: {', '.join(sorted(known))}")

    def rows(files: dict[str, Path], task: TaskFolder) -> list[GoldenExample]:
        file = files.get(task.spec.name)
        return read_labelled(file, task.spec) if file else []

    read = {t.spec.name: Labelled(rows(measurement.calibrate_on, t), rows(measurement.evaluate_on, t)) for t in tasks}
    for task in tasks:
        _check_targets(measurement, task)
    return read


def _check_targets(measurement: Measurement, task: TaskFolder) -> None:
    """An error target is kept on labelled events, or it is a wish."""
    name, targets = task.spec.name, error_targets(task.spec.thresholds)
    if not targets:
        return
    chosen_on, measured_on = measurement.calibrate_on.get(name), measurement.evaluate_on.get(name)
    if chosen_on is None:
        # Floors that came with the task were chosen for another model's confidences.
        raise RefusedError(
            "export.target_unlabelled",
            f"task {name!r} asks for max_wrong of {', '.join(targets)}: give labelled events with --calibrate-on",
        )
    if measured_on is not None and sha256_file(chosen_on) == sha256_file(measured_on):
        raise RefusedError(
            "export.data_repeated",
            f"task {name!r}: floors would be measured on the very events that they are chosen on; give others",
        )
