"""Targets as files: ``export/targets/<name>.toml`` says what a board needs and how far our word for it goes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_agent.contract.manifest import Target
from edge_agent.errors import PermanentError, RefusedError

TARGETS_DIR = Path(__file__).parent / "targets"


class Board(BaseModel):
    """One target.

    ``verification`` says what was done with a built bundle: nothing (*unverified*), *compiled* by the vendor's
    compiler, *emulated*, or *executed* on such hardware. It never claims more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Target
    description: str
    execution_provider: str
    precisions: tuple[Literal["int4", "fp32"], ...]
    memory_budget_bytes: int = Field(ge=0)
    buildable: bool
    verification: Literal["unverified", "compiled", "emulated", "executed"]
    note: str


def load_boards(folder: Path = TARGETS_DIR) -> dict[str, Board]:
    """Every target by name.

    Raises:
        PermanentError: ``export.target_invalid`` naming the file.
    """
    boards: dict[str, Board] = {}
    for file in sorted(folder.glob("*.toml")):
        try:
            board = Board.model_validate(tomllib.loads(file.read_text("utf-8")))
        except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise PermanentError("export.target_invalid", f"{file.name}: {error}") from error
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
