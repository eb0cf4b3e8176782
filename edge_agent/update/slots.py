"""Slots a and b: two places for a bundle, of which one pointer file names the active one.

    slots/
      active          {"slot": "a", "digest": …, "rev": …}     the pointer, replaced atomically
      a/              an installed bundle: hard links into the blob store, never changed
      a.mark          {"mark": "good"|"bad", "digest": …}
      b/  b.mark

Rules:
 * Nothing writes the active slot: `install` takes the other one, and there is no way to name a slot to it.
 * A slot is marked bad before the first byte in it changes, and good only when its bundle is committed.
 * A directory appears under its slot's name only when it is complete and durable.
 * The pointer moves only to a slot that is marked good: by a commit, or back when what it names is damaged.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_agent.contract.manifest import (
    MANIFEST_NAME,
    Manifest,
    Sha256,
    manifest_digest,
    parse_manifest,
    read_manifest,
    verify_files,
)
from edge_agent.contract.messages import ModelRef, model_ref
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError, from_os_error
from edge_agent.fs import copy_durable, fsync_dir, make_dirs, move_durable, write_atomic
from edge_agent.update.blobs import BlobStore

SlotName = Literal["a", "b"]
Mark = Literal["good", "bad"]
NAMES: tuple[SlotName, SlotName] = ("a", "b")
_POINTER = "active"


@dataclass(frozen=True)
class InstalledBundle:
    """A bundle in a slot.

    Args:
        slot: which one.
        path: the bundle's directory.
        manifest: its manifest.
        digest: hex SHA-256 of the manifest, equal to what was recorded when it was installed.
        mark: ``good`` once it was committed.
    """

    slot: SlotName
    path: Path
    manifest: Manifest
    digest: str
    mark: Mark

    @property
    def ref(self) -> ModelRef:
        """Name, version and digest, as they appear in payloads."""
        return model_ref(self.manifest, self.digest)


class _Pointer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    slot: SlotName
    digest: Sha256
    rev: int = 0


class _SlotMark(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    mark: Mark
    digest: Sha256 | None = None
    rev: int = 0


class Slots:
    """The slots under a state directory.

    Args:
        state_dir: the agent's state directory; it is created where absent.
    """

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir / "slots"
        self._blobs = BlobStore(state_dir)
        make_dirs(self._dir)

    def active(self) -> InstalledBundle | None:
        """The bundle to serve, None before the first installation.

        Where the pointer is lost, the marks decide: the good slot with the highest revision.

        Raises:
            IntegrityError: ``slot.corrupt`` when the slot does not hold what the pointer says.
        """
        pointer = self._pointer()
        if pointer is None:
            return None
        bundle = self._read(pointer.slot, pointer)
        if bundle is None:
            detail = f"slot {pointer.slot} does not hold the active bundle {pointer.digest[:12]}"
            raise IntegrityError("slot.corrupt", detail, slot=pointer.slot)
        return bundle

    def previous(self) -> InstalledBundle | None:
        """The bundle in the other slot, if it was committed once and not overwritten since."""
        pointer = self._pointer()
        bundle = None if pointer is None else self._read(_other(pointer.slot), pointer)
        return bundle if bundle is not None and bundle.mark == "good" else None

    def find(self, digest: str) -> InstalledBundle | None:
        """The slot that holds a bundle of this digest, whatever its mark; the active slot first."""
        pointer = self._pointer()
        order = NAMES if pointer is None else (pointer.slot, _other(pointer.slot))
        found = (self._read(name, pointer) for name in order)
        return next((bundle for bundle in found if bundle is not None and bundle.digest == digest), None)

    def committed_rev(self) -> int:
        """Revision of the order that made the active bundle active; 0 when there is none."""
        pointer = self._pointer()
        return 0 if pointer is None else pointer.rev

    def install(self, manifest_bytes: bytes) -> InstalledBundle:
        """Install a bundle whose blobs are all in the store, into the slot that is not active.

        Args:
            manifest_bytes: the exact bytes that were verified.

        Returns:
            The installed bundle, marked bad until `activate`.

        Raises:
            EdgeError: ``blob.missing``, or as mapped by `from_os_error`. The active slot is as before.
        """
        manifest = parse_manifest(manifest_bytes)
        digest = manifest_digest(manifest_bytes)
        pointer = self._pointer()
        slot: SlotName = "a" if pointer is None else _other(pointer.slot)
        self._set_mark(slot, _SlotMark(mark="bad"))
        staging = self._dir / f".{slot}.new"
        try:
            for leftover in (self._dir / slot, staging):
                if leftover.exists():
                    shutil.rmtree(leftover)
            self._fill(staging, manifest, manifest_bytes)
        except OSError as error:
            raise from_os_error(error, f"installing into slot {slot}") from error
        move_durable(staging, self._dir / slot)
        self._set_mark(slot, _SlotMark(mark="bad", digest=digest))
        return InstalledBundle(slot, self._dir / slot, manifest, digest, "bad")

    def activate(self, bundle: InstalledBundle, *, rev: int) -> None:
        """Commit a bundle: mark its slot good, then move the pointer. Idempotent.

        Args:
            bundle: as returned by `install` or `find`.
            rev: revision of the order, remembered with the pointer.

        Raises:
            EdgeError: as mapped by `from_os_error`; the pointer is then the old one or the new one, both good.
        """
        # Good first: a pointer to a slot marked bad must not exist at any moment.
        self._set_mark(bundle.slot, _SlotMark(mark="good", digest=bundle.digest, rev=rev))
        pointer = _Pointer(slot=bundle.slot, digest=bundle.digest, rev=rev)
        if pointer != self._pointer_file():
            write_atomic(self._dir / _POINTER, pointer.model_dump_json().encode())

    def disown(self) -> None:
        """Give up the active bundle, which is damaged: the one before it becomes active again, or none.

        So the next install goes into the damaged slot, and an order for the same release is work again.

        Raises:
            EdgeError: as mapped by `from_os_error`.
        """
        pointer, previous = self._pointer(), self.previous()
        if pointer is None:
            return
        if previous is not None:
            self.activate(previous, rev=pointer.rev)
            self.mark_bad(pointer.slot)
            return
        # Bad first: where the pointer is lost, the marks decide.
        self._set_mark(pointer.slot, _SlotMark(mark="bad", digest=pointer.digest))
        try:
            (self._dir / _POINTER).unlink(missing_ok=True)
            fsync_dir(self._dir)
        except OSError as error:
            raise from_os_error(error, "giving up the active slot") from error

    def mark_bad(self, slot: SlotName) -> None:
        """Say that a slot's bundle must not be gone back to.

        Raises:
            RefusedError: ``slot.active`` for the active slot: there would be nothing left to serve.
        """
        pointer = self._pointer()
        if pointer is not None and pointer.slot == slot:
            raise RefusedError("slot.active", f"slot {slot} is active")
        current = self._mark(slot)
        self._set_mark(slot, current.model_copy(update={"mark": "bad"}))

    def seed(self, bundle_dir: Path) -> InstalledBundle:
        """Install and activate a bundle that came with the machine image, where nothing is active yet.

        The caller has verified its signature (`runtime.open_signed_bundle`).

        Returns:
            The active bundle: the seeded one, or the one that was active already.

        Raises:
            EdgeError: as `read_manifest`, `verify_files` and `install`.
        """
        active = self.active()
        if active is not None:
            return active
        manifest, _ = read_manifest(bundle_dir)
        verify_files(bundle_dir, manifest)
        for entry in manifest.files:
            self._blobs.adopt(bundle_dir / entry.path, entry.sha256)
        installed = self.install((bundle_dir / MANIFEST_NAME).read_bytes())
        self.activate(installed, rev=0)
        return replace(installed, mark="good")

    def referenced(self) -> frozenset[str]:
        """Hashes of the blobs that committed bundles in the slots consist of, manifests included."""
        pointer = self._pointer()
        found = (self._read(name, pointer) for name in NAMES)
        bundles = [bundle for bundle in found if bundle is not None and bundle.mark == "good"]
        return frozenset(entry.sha256 for b in bundles for entry in b.manifest.files) | {b.digest for b in bundles}

    def drop_unproven(self, *, keep_digest: str | None = None) -> None:
        """Remove a bundle that is neither active nor good, to make room.

        Args:
            keep_digest: a bundle that is still wanted.
        """
        pointer = self._pointer()
        for name in NAMES:
            bundle = self._read(name, pointer)
            if bundle is not None and bundle.mark == "bad" and bundle.digest != keep_digest:
                shutil.rmtree(bundle.path, ignore_errors=True)

    def _fill(self, staging: Path, manifest: Manifest, manifest_bytes: bytes) -> None:
        staging.mkdir(mode=0o750)
        directories = {staging}
        for entry in manifest.files:
            target = staging / entry.path
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            directories.update(parent for parent in target.parents if parent.is_relative_to(staging))
            self._place(entry.sha256, entry.size, target)
        # Last: a directory with a manifest is a whole bundle.
        write_atomic(staging / MANIFEST_NAME, manifest_bytes, mode=0o440)
        for directory in sorted(directories, reverse=True):
            fsync_dir(directory)

    def _place(self, sha256: str, size: int, target: Path) -> None:
        if not self._blobs.has(sha256, size):
            raise PermanentError("blob.missing", f"blob {sha256} is not in the store", sha256=sha256)
        try:
            os.link(self._blobs.path(sha256), target)
        except OSError:
            # Another file system, one without hard links (FAT), or too many links: a copy costs space, not safety.
            copy_durable(self._blobs.path(sha256), target)

    def _read(self, slot: SlotName, pointer: _Pointer | None) -> InstalledBundle | None:
        """The slot's bundle, None when there is none or its manifest is not the one that was installed."""
        path = self._dir / slot
        mark = self._mark(slot)
        if pointer is not None and pointer.slot == slot:
            # The pointer outranks the mark: what is active was committed, also where the mark file was lost since.
            mark = _SlotMark(mark="good", digest=pointer.digest)
        try:
            manifest, digest = read_manifest(path)
        except EdgeError:
            return None
        if digest != mark.digest:
            return None
        return InstalledBundle(slot, path, manifest, digest, mark.mark)

    def _mark(self, slot: SlotName) -> _SlotMark:
        # An unreadable mark counts as bad: better to fetch a bundle again than to go back to an unknown one.
        try:
            return _SlotMark.model_validate(json.loads((self._dir / f"{slot}.mark").read_bytes()))
        except (OSError, ValueError, ValidationError):
            return _SlotMark(mark="bad")

    def _set_mark(self, slot: SlotName, mark: _SlotMark) -> None:
        if self._mark(slot) != mark or not (self._dir / f"{slot}.mark").exists():
            write_atomic(self._dir / f"{slot}.mark", mark.model_dump_json().encode())

    def _pointer(self) -> _Pointer | None:
        return self._pointer_file() or self._pointer_from_marks()

    def _pointer_file(self) -> _Pointer | None:
        try:
            return _Pointer.model_validate(json.loads((self._dir / _POINTER).read_bytes()))
        except (OSError, ValueError, ValidationError):
            return None

    def _pointer_from_marks(self) -> _Pointer | None:
        marks = [(name, self._mark(name)) for name in NAMES]
        good = [(mark.rev, name, mark.digest) for name, mark in marks if mark.mark == "good" and mark.digest]
        if not good:
            return None
        rev, name, digest = max(good)
        return _Pointer(slot=name, digest=digest, rev=rev)


def _other(slot: SlotName) -> SlotName:
    return "b" if slot == "a" else "a"
