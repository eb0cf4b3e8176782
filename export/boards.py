"""Targets as files: ``export/targets/<name>.toml`` says what a build needs to know and how far our word for it goes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_agent.contract.manifest import Target
from edge_agent.errors import PermanentError, RefusedError

TARGETS_DIR = Path(__file__).parent / "targets"

Verification = Literal["unverified", "compiled", "emulated", "executed"]
Precision = Literal["int4", "int8", "fp32", "a16w8", "a16w4"]
Activations = Literal["float32", "float16", "uint16"]
Proof = Literal["local", "qemu-arm64", "htp-emulator", "openvino-venv", "gpu"]
_Tokens = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Soc(_Frozen):
    """A chip that binaries are compiled for.

    Args:
        name: as its vendor writes it.
        htp_arch: generation of its Hexagon Tensor Processor: 68, 73, ….
        soc_model: Qualcomm's number of the chip; 0 leaves the choice of a chip with this architecture to the compiler.
        boards: where it is found.
    """

    name: str
    htp_arch: int = Field(ge=68)
    soc_model: int = Field(default=0, ge=0)
    boards: str


class Board(_Frozen):
    """One target.

    Args:
        name: as manifests name it.
        description: which machines.
        machines: what `platform.machine` says on them.
        execution_provider: ONNX Runtime's provider that must run the graphs there.
        emulators: what may stand in for the hardware.
        compilers: vendor's compilers that make binaries of the graphs.
        source: ``fused`` (graph interface 1) or ``portable`` (static graphs, interface 2).
        activations: element type between operators.
        precisions: what can be built, the default first.
        window_tokens: tokens a pass of each static graph, widest first; empty for dynamic graphs.
        past_tokens: positions that a static graph looks back on; None for dynamic graphs.
        socs: chips that binaries are compiled for.
        proof: how a build proves its bundle.
        agreement_floor: least share of golden events that must be decided as they must be.
        minimum_onnxruntime: oldest version of ONNX Runtime that runs its graphs.
        memory_budget_bytes: what the smallest such machine can spare.
        buildable: whether `edge-export build` takes the target.
        verification: the strongest word that our own suite has earned for the target. A bundle's report carries the
            word that its own build earned (`export.proof.evidence.verification`).
        proved_by: id of the test that earns that word.
        note: one line for people.
    """

    name: Target
    description: str
    machines: tuple[str, ...] = Field(min_length=1)
    execution_provider: str
    emulators: tuple[Literal["qemu-aarch64", "htp"], ...] = ()
    compilers: tuple[Literal["qnn"], ...] = ()
    source: Literal["fused", "portable"]
    activations: Activations
    precisions: tuple[Precision, ...] = Field(min_length=1)
    window_tokens: tuple[_Tokens, ...] = ()
    past_tokens: _Tokens | None = None
    socs: tuple[Soc, ...] = ()
    proof: Proof
    agreement_floor: float = Field(gt=0.9, le=1)
    minimum_onnxruntime: str = Field(default="1.32.0", pattern=r"^\d+\.\d+\.\d+$")
    memory_budget_bytes: int = Field(gt=0)
    buildable: bool
    verification: Verification
    proved_by: str | None = None
    note: str

    @model_validator(mode="after")
    def _says_nothing_unproven(self) -> Board:
        if (self.verification == "unverified") != (self.proved_by is None):
            raise ValueError(f"{self.verification!r} and a test that proves it go together")
        if self.verification == "emulated" and not self.emulators:
            raise ValueError("emulated, but no emulator is named")
        if self.verification == "compiled" and not self.compilers:
            raise ValueError("compiled, but no compiler is named")
        return self

    @model_validator(mode="after")
    def _static_or_dynamic(self) -> Board:
        static = self.source == "portable"
        if static != bool(self.window_tokens) or static != (self.past_tokens is not None):
            raise ValueError("portable graphs, and only they, have window_tokens and past_tokens")
        if list(self.window_tokens) != sorted(set(self.window_tokens), reverse=True):
            raise ValueError("window_tokens are told widest first")
        return self

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the target cannot have.

        Raises:
            RefusedError: ``export.precision_unsupported``.
        """
        if precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise RefusedError("export.precision_unsupported", f"{self.name} takes {known}, not {precision}")

    def check_memory(self, ram_bytes: int) -> None:
        """Refuse a model that the smallest such machine has no memory for.

        Args:
            ram_bytes: estimate for the worker.

        Raises:
            RefusedError: ``export.memory_budget``.
        """
        if ram_bytes > self.memory_budget_bytes:
            raise RefusedError(
                "export.memory_budget",
                f"the worker would take about {ram_bytes >> 20} MiB, {self.name} has {self.memory_budget_bytes >> 20}",
                ram_bytes=ram_bytes,
                limit=self.memory_budget_bytes,
            )


def load_boards(folder: Path = TARGETS_DIR) -> dict[str, Board]:
    """Every target by name.

    Raises:
        PermanentError: ``export.target_invalid`` naming the file.
    """
    boards: dict[str, Board] = {}
    for file in sorted(folder.glob("*.toml")):
        try:
            board = Board.model_validate(tomllib.loads(file.read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise PermanentError("export.target_invalid", f"{file.name}: {error}") from error
        if board.name != file.stem:
            raise PermanentError("export.target_invalid", f"{file.name} describes {board.name}")
        boards[board.name] = board
    return boards


def buildable_board(name: str, folder: Path = TARGETS_DIR) -> Board:
    """The target to build for.

    Raises:
        RefusedError: ``export.target_unknown`` or ``export.target_not_buildable``.
    """
    boards = load_boards(folder)
    if name not in boards:
        raise RefusedError("export.target_unknown", f"no target {name!r}; there are: {', '.join(boards)}")
    board = boards[name]
    if not board.buildable:
        raise RefusedError("export.target_not_buildable", f"{name} cannot be built yet: {board.note}", target=name)
    return board
