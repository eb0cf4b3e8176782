"""What every part of a task file has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A part of a task file: frozen, and a key that it does not know is a mistake that the engineer is told of."""

    model_config = ConfigDict(frozen=True, extra="forbid")
