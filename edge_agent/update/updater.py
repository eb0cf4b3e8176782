"""The updater: drives `machine.step` on a thread of its own. Persist, act, feed the result back.

Thread rules: `resume` runs once, before `run` and before the agent asks the slots what to serve; `on_desired` and
`reported` may be called from any thread and return at once; everything else happens on the thread of `run`.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from pathlib import Path

from edge_agent.contract.messages import ErrorInfo, ModelRef, Reported, now_ms
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError
from edge_agent.log import get_logger
from edge_agent.settings import UpdateSettings
from edge_agent.update import admission, machine
from edge_agent.update.clock import Clock, SystemClock
from edge_agent.update.journal import Journal
from edge_agent.update.machine import RULES, Action, Record
from edge_agent.update.ports import Interrupted, UpdaterPorts
from edge_agent.update.slots import InstalledBundle, Slots
from edge_agent.update.trust import open_desired
from edge_agent.update.trust_process import find_release_in_child
from edge_agent.update.work import FindRelease, Work

_BACKOFF_BASE_S = 1.0
_BACKOFF_MAX_S = 300.0
_IDLE_SLICE_S = 0.5
_PAUSE_SLICE_S = 2.0
_PAUSE_AFTER_FAULT_S = 5.0
_MAILBOX = 8
_PROGRESS_STEP = 0.05
_log = get_logger(__name__)


class Updater:
    """Brings this node to its desired state, or says why not.

    Args:
        settings: registry, trust directory, limits.
        state_dir: the agent's state directory.
        node: this node's name; orders for others are refused.
        ports: the rest of the agent.
        clock: time.
        find_release: asks the registry's metadata; a seam for tests.
    """

    def __init__(
        self,
        settings: UpdateSettings,
        state_dir: Path,
        node: str,
        ports: UpdaterPorts,
        *,
        clock: Clock | None = None,
        find_release: FindRelease = find_release_in_child,
    ) -> None:
        self._settings = settings
        self._node = node
        self._ports = ports
        self._clock = clock or SystemClock()
        self.slots = Slots(state_dir)
        self._journal = Journal(state_dir)
        self._work = Work(settings, state_dir, self.slots, ports, self._clock, find_release)
        self._record = Record()
        self._pending: deque[Action] = deque()
        self._entered_s = self._clock.monotonic_s()
        self._stop = threading.Event()
        self._patient = False  # while the daemon starts or stops, nothing waits for a full disk to drain
        self._mail: deque[bytes] = deque(maxlen=_MAILBOX)
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._progress = 0.0
        self._told_serving: str | None = None
        self._refusal: ErrorInfo | None = None
        self._reported = self._describe()

    def resume(self) -> None:
        """Find out, after a start, what was going on; finish a commit that was cut off. Does not block.

        Call it before asking `slots` for the bundle to serve.
        """
        record, fault = self._journal.load()
        if fault is not None:
            _log.error("update_state_corrupt", error=fault)
        if record is None:
            # The pointer remembers the revision, so that losing the journal does not open the door to replays.
            error = None if fault is None else _info(fault)
            record = Record(rev_seen=self.slots.committed_rev(), error=error)
        self._record = record
        try:
            self._apply(machine.Resumed())
            if self._pending and self._pending[0] is Action.COMMIT:
                self._perform(self._pending.popleft())
        except EdgeError as error:
            # A read-only or full disk at boot: the model serves; the update is tried again on the updater's thread.
            _log.error("update_resume_failed", error=error)
            self._queue_work()
        self._publish()

    def disown_active(self) -> None:
        """Give up the active bundle, which turned out damaged (see `Slots.disown`). Call it before `run`.

        Raises:
            EdgeError: as mapped by `from_os_error`.
        """
        self.slots.disown()
        self._publish()

    def on_desired(self, envelope: bytes) -> None:
        """Take a desired envelope. It is verified on the updater's thread."""
        if not envelope:
            return  # a cleared retained message orders nothing
        with self._lock:
            self._mail.append(envelope)
        self._wake.set()

    def reported(self) -> Reported:
        """The last published state."""
        with self._lock:
            return self._reported

    def run(self, stop: threading.Event) -> None:
        """Thread body: work and wait until ``stop`` is set."""
        self._stop = stop
        self._patient = True
        while not stop.is_set():
            try:
                busy = self.advance()
            except Exception:  # noqa: BLE001 - as in _perform; here the state's work is queued again
                _log.exception("update_internal", state=self._record.phase)
                self._queue_work()
                busy = self._clock.wait(stop, _PAUSE_AFTER_FAULT_S)
            if not busy:
                self._clock.wait(self._wake, _IDLE_SLICE_S)
        self._remember_the_stop()

    def advance(self) -> bool:
        """Read the mail and perform at most one action.

        Returns:
            Whether anything was done; False means that there is nothing to do until the next order.
        """
        try:
            if self._read_mail():
                return True
            if not self._pending:
                return False
            self._perform(self._pending.popleft())
        except Interrupted:
            return not self._stop.is_set()
        return True

    def _queue_work(self) -> None:
        self._pending = deque((RULES[self._record.phase].work,) if self._record.phase in RULES else ())

    # -- one action -------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        phase = self._record.phase
        try:
            signal = self._signal_of(action)
        except Interrupted as interrupted:
            if interrupted.reason == "deadline":
                self._apply(machine.DeadlinePassed())
            return
        except EdgeError as error:
            _log.warning("update_step_failed", state=phase, error=error)
            signal = machine.Failed(_info(error), retryable=isinstance(error, TransientError))
        except Exception as error:  # noqa: BLE001 - the thread must outlive a bug; the update does not
            _log.exception("update_internal", state=phase)
            fault = PermanentError("update.internal", f"{type(error).__name__}: {error}")
            signal = machine.Failed(_info(fault), retryable=False)
        if signal is not None:
            self._apply(signal)

    def _signal_of(self, action: Action) -> machine.Signal | None:
        order = self._record.request
        if order is None:
            return None
        match action:
            case Action.WAIT:
                self._pause(self._backoff_s())
                return None
            case Action.DOWNLOAD:
                if self._work.is_active(order):
                    return machine.AlreadyActive()
                self._work.download(order, self._checkpoint)
            case Action.VERIFY:
                self._work.verify(order, self._checkpoint)
            case Action.INSTALL:
                self._work.install(order)
            case Action.TRIAL:
                self._work.trial(order)
            case Action.PROBATION:
                self._work.probation(order, self._record.resumes, self._checkpoint)
            case Action.COMMIT:
                self._work.commit(order)
            case Action.ROLL_BACK:
                self._work.roll_back(order)
        # Work that cannot be interrupted (trial, install) may have outlived its order or its time.
        self._checkpoint()
        return machine.Succeeded()

    def _checkpoint(self, progress: float | None = None) -> None:
        if self._stop.is_set():
            raise Interrupted("stop")
        if self._read_mail():
            raise Interrupted("superseded")
        allowed_s = machine.deadline_s(self._record)
        if allowed_s is not None and self._clock.monotonic_s() - self._entered_s > allowed_s:
            raise Interrupted("deadline")
        advanced = progress is not None and not self._progress <= progress < self._progress + _PROGRESS_STEP
        if advanced or self._work.serving != self._told_serving:
            self._progress = self._progress if progress is None else progress
            self._publish()

    def _backoff_s(self) -> float:
        ceiling = min(_BACKOFF_MAX_S, _BACKOFF_BASE_S * 2 ** min(self._record.attempts, 16))
        return random.uniform(0, ceiling)  # noqa: S311 - full jitter, not a secret

    def _pause(self, pause_s: float) -> None:
        until_s = self._clock.monotonic_s() + pause_s
        while (left_s := until_s - self._clock.monotonic_s()) > 0:
            self._checkpoint()
            self._clock.wait(self._wake, min(left_s, _PAUSE_SLICE_S))

    # -- orders -----------------------------------------------------------------------------------------------------

    def _read_mail(self) -> bool:
        """Judge the envelopes that came. Returns whether what was being done is to be left."""
        self._wake.clear()
        left = False
        while True:
            with self._lock:
                if not self._mail:
                    return left
                envelope = self._mail.popleft()
            left = self._judge(envelope) or left

    def _judge(self, envelope: bytes) -> bool:
        try:
            order = open_desired(envelope, self._settings.trust_dir)
        except EdgeError as error:
            self._refuse(error)
            return False
        verdict = admission.admit(order, self._facts())
        if verdict.error is not None:
            self._refuse(verdict.error)
            if verdict.authentic:
                self._apply(machine.Refused(order, _info(verdict.error)))
            return False
        self._refusal = None
        if not verdict.accepted:
            self._publish()
            return False
        _log.info("update_desired", rev=order.rev, release=order.release, digest=order.digest)
        return self._apply(machine.Desired(order))

    def _refuse(self, error: EdgeError) -> None:
        _log.warning("update_refused", error=error)
        self._refusal = _info(error)
        self._publish()

    def _facts(self) -> admission.Facts:
        active = self._active()
        return admission.Facts(
            node=self._node,
            target=self._settings.target,
            now=self._work.now(),
            record=self._record,
            active_name=None if active is None else active.manifest.name,
            active_version=None if active is None else active.manifest.version,
            active_digest=None if active is None else active.digest,
        )

    # -- persist, then act ------------------------------------------------------------------------------------------

    def _apply(self, signal: machine.Signal) -> bool:
        """One transition: persist it, then queue its actions. Returns whether there is new work (or none any more)."""
        before = self._record
        record, actions = machine.step(before, signal)
        if record != before:
            self._persist(record)
        self._record = record
        # A retry stays in its state, and under its deadline; a newer order starts afresh also in the same state.
        entered = record.phase != before.phase or (bool(actions) and actions[0] is not Action.WAIT)
        if entered or actions:
            self._pending = deque(actions)
        if entered:
            self._entered_s = self._clock.monotonic_s()
            self._progress = 0.0
            _log.info("update_state", state=record.phase, was=before.phase, code=record.error and record.error.code)
        self._publish()
        return entered or bool(actions)

    def _persist(self, record: Record) -> None:
        while True:
            try:
                self._journal.save(record)
            except EdgeError as error:
                if not self._patient:
                    raise
                # Nothing may be done that is not written down. A full disk drains; the old model keeps serving.
                _log.error("update_not_persisted", error=error)
                self._refusal = _info(error)
                self._publish()
                if self._clock.wait(self._stop, _PAUSE_AFTER_FAULT_S):
                    raise Interrupted("stop") from error
            else:
                if self._refusal is not None and self._refusal.code.startswith(("disk.", "os.")):
                    self._refusal = None
                return

    def _remember_the_stop(self) -> None:
        self._patient = False
        try:
            self._apply(machine.Stopped())
        except EdgeError as error:
            _log.error("update_not_persisted", error=error)  # the next start counts as a crash: safe

    # -- telling ----------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        reported = self._describe()
        self._told_serving = self._work.serving
        with self._lock:
            same = reported == self._reported.model_copy(update={"timestamp_ms": reported.timestamp_ms})
            self._reported = reported
        if not same:
            self._ports.report(reported)

    def _describe(self) -> Reported:
        record = self._record
        active = self._active()
        previous = self.slots.previous()
        serving = self._work.serving
        candidate = self.slots.find(serving) if serving and active and serving != active.digest else None
        if candidate is not None:  # in probation the candidate answers; the active slot is what we go back to
            active, previous = candidate, active
        order = record.request
        return Reported(
            rev=record.rev_seen or None if order is None else order.rev,
            state=record.state,
            release=None if order is None else order.release,
            digest=None if order is None else order.digest,
            active=_ref(active),
            previous=_ref(previous),
            progress=1.0 if record.phase == "committed" else round(self._progress, 2),
            error=self._refusal or record.error,
            timestamp_ms=now_ms(),
        )

    def _active(self) -> InstalledBundle | None:
        try:
            return self.slots.active()
        except IntegrityError as error:
            _log.error("update_active_slot_corrupt", error=error)
            return None


def _ref(bundle: InstalledBundle | None) -> ModelRef | None:
    return None if bundle is None else bundle.ref


def _info(error: EdgeError) -> ErrorInfo:
    return ErrorInfo(code=error.code, type=error.kind, detail=error.detail)
