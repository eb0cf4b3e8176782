"""Stages on disk: each turns inputs into a folder of outputs, and a folder that is there is never made twice.

``work/<stage>/`` holds a stage's outputs, ``work/<stage>/stage.json`` its key and the hash of every output. The key is
a digest of everything that the outputs depend on, the keys of earlier stages included. A stage is built in a hidden
folder and appears by one rename, so that a power cut leaves either a whole stage or none; what is reused is hashed
again, so that a damaged output is made anew instead of being built upon.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_agent.errors import EdgeError, RefusedError, from_os_error
from edge_agent.fs import fsync_dir, make_dirs, sha256_file, write_atomic

STAGE_NAME = "stage.json"
LOCK_NAME = "lock"

Make = Callable[[Path], None]


class Progress(Protocol):
    """Who is told how far a build is: `export.progress`, or a test."""

    def begins(self, stage: str) -> None:
        """A stage begins."""

    def line(self, text: str) -> None:
        """A sentence about the running stage."""

    def ends(self, timing: StageTiming) -> None:
        """The stage is done."""


@dataclass(frozen=True)
class StageTiming:
    """What a stage took.

    Args:
        stage: its name.
        seconds: wall time of this run; for a reused stage, of looking at it.
        reused: whether its outputs were there already.
    """

    stage: str
    seconds: float
    reused: bool


class Pipeline:
    """The stages of one build.

    Args:
        work: folder of the stages' outputs, made where it is missing.
        progress: is told what happens.
        versions: of the libraries that shape outputs; part of every key.
    """

    def __init__(self, work: Path, progress: Progress, versions: Mapping[str, str]) -> None:
        self.work = work
        self.progress = progress
        self.timings: list[StageTiming] = []
        self._versions = dict(versions)
        self._keys: dict[str, str] = {}

    @contextlib.contextmanager
    def opened(self, *, keep: bool = True) -> Iterator[None]:
        """Hold the work folder: two builds in one folder would take each other's stages away.

        Args:
            keep: whether the folder stays where nothing was made in it.

        Raises:
            RefusedError: ``export.work_busy``.
            EdgeError: ``disk.*`` when the folder cannot be made.
        """
        make_dirs(self.work, mode=0o755)
        descriptor = os.open(self.work / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RefusedError("export.work_busy", f"another build works in {self.work}") from error
            for leftover in self.work.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            os.close(descriptor)
            shutil.rmtree(self.scratch_path, ignore_errors=True)
            if not keep and not any(self.work.glob(f"*/{STAGE_NAME}")):
                shutil.rmtree(self.work, ignore_errors=True)

    @property
    def scratch_path(self) -> Path:
        """Where what is needed during this run only may lie."""
        return self.work / ".scratch.partial"

    def scratch(self) -> Path:
        """An empty folder for the time of this run."""
        shutil.rmtree(self.scratch_path, ignore_errors=True)
        self.scratch_path.mkdir()
        return self.scratch_path

    def stage(self, name: str, inputs: Mapping[str, Any], make: Make, *, after: tuple[str, ...] = ()) -> Path:
        """Make a stage's outputs, or find them made.

        Args:
            name: the stage, a file name.
            inputs: everything beside earlier stages that the outputs depend on; JSON.
            make: writes the outputs into the empty folder that it is given.
            after: earlier stages whose outputs are read.

        Returns:
            The folder of the outputs.

        Raises:
            EdgeError: what ``make`` raises, or ``disk.*``.
        """
        started_s = time.monotonic()
        folder = self.work / name
        key = self._key(name, inputs, after)
        self.progress.begins(name)
        reused = is_whole(folder, key)
        if not reused:
            with _errors_named(name):
                self._make(folder, key, make)
        self._keys[name] = key
        self._ended(StageTiming(name, time.monotonic() - started_s, reused))
        return folder

    @contextlib.contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """Time a stage that is run every time: it checks the inputs, or publishes the outcome."""
        started_s = time.monotonic()
        self.progress.begins(name)
        with _errors_named(name):
            yield
        self._ended(StageTiming(name, time.monotonic() - started_s, reused=False))

    def _ended(self, timing: StageTiming) -> None:
        self.timings.append(timing)
        self.progress.ends(timing)

    def _key(self, name: str, inputs: Mapping[str, Any], after: tuple[str, ...]) -> str:
        depends = {
            "stage": name,
            "inputs": inputs,
            "after": {stage: self._keys[stage] for stage in after},
            "versions": self._versions,
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _make(self, folder: Path, key: str, make: Make) -> None:
        building = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            make(building)
            files = {}
            for path in sorted(path for path in building.rglob("*") if path.is_file()):
                with path.open("rb") as reader:
                    os.fsync(reader.fileno())
                files[path.relative_to(building).as_posix()] = sha256_file(path)
            stamp = json.dumps({"key": key, "files": files}, indent=2, sort_keys=True) + "\n"
            write_atomic(building / STAGE_NAME, stamp.encode(), mode=0o644)
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)
            fsync_dir(folder.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def is_whole(folder: Path, key: str) -> bool:
    """Whether a stage's folder holds exactly what was made for this key.

    Args:
        folder: ``work/<stage>``.
        key: digest of the stage's inputs.
    """
    try:
        stamp = json.loads((folder / STAGE_NAME).read_text("utf-8"))
        return bool(stamp["key"] == key) and all(
            sha256_file(folder / name) == digest for name, digest in stamp["files"].items()
        )
    except (OSError, EdgeError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _errors_named(stage: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, f"stage {stage}") from error
