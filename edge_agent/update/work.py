"""The work of each state: what `updater` does for an action. Every piece is idempotent and may be cut off anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from edge_agent.contract.manifest import Manifest, parse_manifest, verify_files
from edge_agent.contract.messages import DesiredState
from edge_agent.errors import IntegrityError, PermanentError, RefusedError, from_os_error
from edge_agent.fs import require_space
from edge_agent.log import get_logger
from edge_agent.settings import UpdateSettings
from edge_agent.update.admission import parse_release
from edge_agent.update.blobs import BlobStore
from edge_agent.update.clock import Clock
from edge_agent.update.fetch import Fetcher, Wanted, blob_url_path
from edge_agent.update.ports import Checkpoint, UpdaterPorts
from edge_agent.update.slots import InstalledBundle, Slots
from edge_agent.update.transport import open_transport
from edge_agent.update.trust import TrustedRelease, trusted_now
from edge_agent.update.trust_process import Request, find_release_in_child
from edge_agent.update.verdict import check_trial, judge_probation

PROBATION_POLL_S = 1.0
_log = get_logger(__name__)
FindRelease = Callable[[Request, Callable[[], None]], TrustedRelease]


class Work:
    """Performs the states' work on one device.

    Args:
        settings: registry, limits.
        state_dir: blobs, slots and metadata cache lie below it.
        slots: the slots under the same directory.
        ports: the rest of the agent.
        clock: time.
        find_release: asks the registry's TUF metadata; the default does so in a child process.
    """

    def __init__(
        self,
        settings: UpdateSettings,
        state_dir: Path,
        slots: Slots,
        ports: UpdaterPorts,
        clock: Clock,
        find_release: FindRelease = find_release_in_child,
    ) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._slots = slots
        self._ports = ports
        self._clock = clock
        self._find_release = find_release
        self._blobs = BlobStore(state_dir)
        self._fetcher: Fetcher | None = None
        self._never = threading.Event()
        # Digest of the last successful swap in this process; None: the agent serves what was active at its start.
        self.serving: str | None = None

    def now(self) -> datetime:
        """Reference time: see `clock.reference_time`."""
        return trusted_now(self._state_dir, self._clock.now())

    def is_active(self, order: DesiredState) -> bool:
        """Whether the ordered bundle is the active one already, and whole.

        A damaged one is given up: installing the same release again is the cure.
        """
        try:
            active = self._slots.active()
            if active is None or active.digest != order.digest:
                return False
            verify_files(active.path, active.manifest)
        except IntegrityError as error:
            _log.error("active_bundle_damaged", error=error)
            self._slots.disown()
            return False
        return True

    def download(self, order: DesiredState, checkpoint: Checkpoint) -> None:
        """Metadata, manifest, space, blobs, in this order: nothing is fetched that was not vouched for.

        Raises:
            EdgeError: ``trust.*``, ``fetch.*``, ``disk.full``, ``update.expired``, ``update.no_registry``.
        """
        if self._settings.registry_url is None:
            raise PermanentError("update.no_registry", "settings.update.registry_url is not set")
        if order.not_after <= self.now():
            raise RefusedError("update.expired", f"order expired at {order.not_after.isoformat()}")
        request = Request(
            release=order.release,
            registry_url=self._settings.registry_url,
            trust_dir=self._settings.trust_dir,
            state_dir=self._state_dir,
            wall=self._clock.now(),
        )
        release = self._find_release(request, checkpoint)
        if release.sha256 != order.digest:
            detail = f"{order.release} is {release.sha256[:12]} at the registry, {order.digest[:12]} was ordered"
            raise IntegrityError("trust.digest_mismatch", detail)
        fetcher = self._open_fetcher(self._settings.registry_url)
        fetcher.fetch(Wanted(release.url_path, release.sha256, release.size), lambda _: checkpoint(0.0))
        self._fetch_blobs(fetcher, self._manifest(order), order.digest, checkpoint)

    def _open_fetcher(self, registry_url: str) -> Fetcher:
        if self._fetcher is None:
            self._fetcher = Fetcher(
                open_transport(registry_url),
                self._blobs,
                self._clock,
                bandwidth_bytes_per_s=self._settings.bandwidth_bytes_per_s,
            )
        return self._fetcher

    def _fetch_blobs(self, fetcher: Fetcher, manifest: Manifest, digest: str, checkpoint: Checkpoint) -> None:
        wanted = {entry.sha256: entry.size for entry in manifest.files}
        self._slots.drop_unproven(keep_digest=digest)
        self._blobs.collect(self._slots.referenced() | wanted.keys() | {digest})
        missing = sum(self._blobs.missing_bytes(sha256, size) for sha256, size in wanted.items())
        unpacked = max(0, manifest.resources.disk_bytes - manifest.size_bytes)
        require_space(self._state_dir, missing + unpacked, reserve_bytes=self._settings.reserve_disk_bytes)
        total = max(1, sum(wanted.values()))
        before = 0
        for sha256, size in wanted.items():
            item = Wanted(blob_url_path(sha256), sha256, size)
            fetcher.fetch(item, lambda length, before=before: checkpoint((before + length) / total))  # type: ignore[misc]
            before += size
            checkpoint(before / total)

    def verify(self, order: DesiredState, checkpoint: Checkpoint) -> None:
        """Hash everything as it lies on this disk, and match the manifest with the order.

        A damaged blob is removed and reported as transient: trying again fetches it anew.

        Raises:
            EdgeError: ``blob.corrupt``, ``trust.manifest_mismatch``, and as `download`.
        """
        manifest = self._manifest_or_none(order)
        if manifest is None or not all(self._blobs.has(f.sha256, f.size) for f in manifest.files):
            self.download(order, checkpoint)
            manifest = self._manifest(order)
        ordered = parse_release(order.release)
        if (manifest.name, manifest.version, manifest.target) != (ordered.name, ordered.version, ordered.target):
            detail = f"manifest says {manifest.name}/{manifest.version}/{manifest.target}, not {order.release}"
            raise IntegrityError("trust.manifest_mismatch", detail)
        for number, entry in enumerate(manifest.files):
            checkpoint(number / len(manifest.files))
            self._blobs.verify(entry.sha256, entry.size)

    def install(self, order: DesiredState) -> None:
        """Put the bundle into the slot that is not active."""
        self._slots.install(self._manifest_bytes(order))

    def trial(self, order: DesiredState) -> None:
        """Golden examples in a side worker.

        Raises:
            EdgeError: ``trial.*``, or what the worker raised.
        """
        bundle = self._candidate(order)
        check_trial(self._ports.trial(bundle.path, bundle.digest), self._settings)

    def probation(self, order: DesiredState, crashes: int, checkpoint: Checkpoint) -> None:
        """Let the candidate serve, and watch it until it has passed.

        Raises:
            EdgeError: ``probation.*``, or what the swap raised.
        """
        bundle = self._candidate(order)
        self._swap(bundle)
        started_s = self._clock.monotonic_s()
        while True:
            elapsed_s = self._clock.monotonic_s() - started_s
            outlook = judge_probation(
                self._ports.probation(), order, self._settings, elapsed_s=elapsed_s, crashes=crashes
            )
            checkpoint(outlook.progress)
            if outlook.passed:
                return
            self._clock.wait(self._never, min(PROBATION_POLL_S, order.probation_s / 10))

    def commit(self, order: DesiredState) -> None:
        """Move the active pointer. The only place that does."""
        bundle = self._candidate(order)
        self._slots.activate(bundle, rev=order.rev)
        if self.serving not in {None, bundle.digest}:
            # Only after a rollback that failed: the order names the active bundle, but another one still serves.
            self._swap(bundle)

    def roll_back(self, order: DesiredState) -> None:
        """Serve the active bundle again; without one (first installation), serve nothing."""
        active = self._slots.active()
        if active is None:
            self._ports.withdraw()
            self.serving = None
        else:
            self._swap(active)
        failed = self._slots.find(order.digest)
        if failed is not None and (active is None or failed.slot != active.slot):
            self._slots.mark_bad(failed.slot)

    def _swap(self, bundle: InstalledBundle) -> None:
        self._ports.swap(bundle.path, bundle.digest)
        self.serving = bundle.digest

    def _candidate(self, order: DesiredState) -> InstalledBundle:
        bundle = self._slots.find(order.digest)
        if bundle is None:
            raise IntegrityError("slot.corrupt", f"no slot holds the bundle {order.digest[:12]} any more")
        return bundle

    def _manifest(self, order: DesiredState) -> Manifest:
        return parse_manifest(self._manifest_bytes(order))

    def _manifest_or_none(self, order: DesiredState) -> Manifest | None:
        path = self._blobs.path(order.digest)
        if not path.is_file():
            return None
        self._blobs.verify(order.digest, path.stat().st_size)
        return self._manifest(order)

    def _manifest_bytes(self, order: DesiredState) -> bytes:
        try:
            return self._blobs.path(order.digest).read_bytes()
        except OSError as error:
            raise from_os_error(error, "reading the manifest") from error
