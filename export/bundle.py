"""The output directory: complete or absent, and equal for equal input."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_agent.contract.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest
from edge_agent.errors import RefusedError, from_os_error
from edge_agent.fs import fsync_dir, sha256_file, write_atomic

TOOLS = (
    "mobius-onnx",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


STAGE_TOOLS = (*TOOLS, "optimum-onnx", "onnxruntime-qnn")
"""Those for accelerators too: with them a stage may come out otherwise, or prove more."""


@contextlib.contextmanager
def fresh_directory(out: Path, *, force: bool) -> Iterator[Path]:
    """A directory to build in, which becomes ``out`` only when the block ends without an exception.

    Args:
        out: the final place.
        force: whether an existing bundle there is replaced.

    Raises:
        RefusedError: ``export.out_exists``.
    """
    check_out(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".partial"))
    except OSError as error:
        raise from_os_error(error, "creating the output directory") from error
    try:
        yield building
        _publish(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_out(out: Path, *, force: bool) -> None:
    """Refuse before the work begins, not after it.

    Raises:
        RefusedError: ``export.out_exists`` when there is something that must not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_NAME).is_file():
        # Never with force either: a mistyped --out must not delete somebody's folder.
        raise RefusedError("export.out_exists", f"{out} exists and is not a bundle")
    if not force:
        raise RefusedError("export.out_exists", f"{out} holds a bundle already: use --force to replace it")


def write_file(folder: Path, name: str, content: bytes) -> None:
    """Write one file of the bundle under construction."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content, mode=0o644)


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file of the bundle by content, in path order, without manifest and signature."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [(path.relative_to(folder).as_posix(), path) for path in paths]
    return tuple(
        FileEntry(path=name, size=path.stat().st_size, sha256=sha256_file(path))
        for name, path in names
        if name not in (MANIFEST_NAME, SIGNATURE_NAME)
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, last of all files."""
    write_file(folder, MANIFEST_NAME, manifest.to_bytes())


def tool_versions(names: Iterable[str] = TOOLS) -> dict[str, str]:
    """Versions of the libraries that shape the bytes; build variants (``+cpu``) left out."""
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name).partition("+")[0]
    return found


def _publish(building: Path, out: Path) -> None:
    try:
        for path in [building, *building.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            if path.is_file():
                with path.open("rb") as reader:
                    os.fsync(reader.fileno())
        for folder in [*(path for path in building.rglob("*") if path.is_dir()), building]:
            fsync_dir(folder)
        if out.exists():
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".old"))
            out.rename(old / "bundle")
            building.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            building.rename(out)
        fsync_dir(out.parent)
    except OSError as error:
        raise from_os_error(error, f"publishing {os.fspath(out)}") from error
