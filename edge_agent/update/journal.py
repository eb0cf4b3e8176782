"""The updater's memory across power cuts: one small file, replaced atomically before anything is done."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from edge_agent.errors import EdgeError, PermanentError, from_os_error
from edge_agent.fs import write_atomic
from edge_agent.update.machine import Record

JOURNAL_NAME = "update.json"


class Journal:
    """``update.json`` under the state directory.

    Args:
        state_dir: the agent's state directory; it must exist.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / JOURNAL_NAME

    def load(self) -> tuple[Record | None, EdgeError | None]:
        """Read the record.

        Returns:
            The record and None; None and None before the first save; None and ``update.state_corrupt`` for a file
            that cannot be used (the caller then starts from what the slots say, and reports it).
        """
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return None, None
        except OSError as error:
            return None, from_os_error(error, "reading the update's state")
        try:
            return Record.model_validate(json.loads(raw)), None
        except (ValueError, ValidationError, RecursionError):
            detail = f"{JOURNAL_NAME} cannot be read: starting from the active slot, which is untouched"
            return None, PermanentError("update.state_corrupt", detail, path=str(self._path))

    def save(self, record: Record) -> None:
        """Make the record durable.

        Raises:
            EdgeError: as `fs.write_atomic`; the former record is then still there.
        """
        write_atomic(self._path, (record.model_dump_json(indent=1) + "\n").encode())
