"""Composition root of the daemon: who is made of what, in which order it starts and stops.

Threads: the network thread and the intake thread belong to the uplink, the updater has one, the escalator has one and a
few that wait for its server, and the main thread answers events. No network thread runs inference; nothing but the main
thread takes events out of the inbox; nothing but the updater's thread exchanges models.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from importlib import metadata
from types import FrameType
from typing import Literal

from edge_agent.accepting import Accepting
from edge_agent.answering import Answering, Step
from edge_agent.contract.messages import InferenceTelemetry, Meta, Reported, Status, now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, from_os_error
from edge_agent.escalating import Escalating
from edge_agent.health.hardware import hardware_facts, hardware_telemetry
from edge_agent.health.notify import Notifier
from edge_agent.log import configure, get_logger
from edge_agent.runtime.serving import ServingWorker, worker_on
from edge_agent.runtime.thread_choice import FILE_NAME, ThreadChoice
from edge_agent.settings import Settings
from edge_agent.update.updater import Updater
from edge_agent.updating import ModelExchange
from edge_agent.uplink.session import MqttUplink
from edge_agent.uplink.spool import Spool

_log = get_logger(__name__)
IDLE_WAIT_S = 1.0
BLOCKED_WAIT_S = 0.1
MODEL_ALARM = "model"
ESCALATION_ALARM = "escalation"
# Beside the worker's start and the deadline: ending the worker before, writing the decision after.
_TURN_SPARE_S = 5.0
# Until the swap back is done, a candidate that failed its probation still answers.
UNPROVEN = frozenset({"probation", "rolling_back"})
VERSION = metadata.version("edge-agent")


class Agent:
    """One node: everything between its broker, its registry and its model.

    Args:
        settings: checked settings.

    Raises:
        EdgeError: the state directory or the spool cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._boot_id = uuid.uuid4().hex
        self._since_ms = now_ms()
        self._draining = False
        self._alarmed = False
        self._state_lock = _claim_state_dir(settings)
        self._topics = NodeTopics(settings.node.site, settings.node.name)
        self._spool = Spool(
            settings.state_dir / "spool.sqlite", settings.spool, deadletter_topic=self._topics.deadletter
        )
        threads = ThreadChoice(settings.worker_here, settings.state_dir / FILE_NAME)
        self._serving = ServingWorker(
            settings.worker_here, lambda bundle, digest: worker_on(bundle, digest, threads.settings_for(digest))
        )
        self._accepting = Accepting(self._spool, lambda: self._serving.model.tasks if self._serving.model else {})
        self._exchange = ModelExchange(self._serving, threads, self._publish_reported, self._announce_model)
        self._updater = Updater(settings.update, settings.state_dir, settings.node.name, self._exchange)
        self._escalating = Escalating(
            self._spool, settings.escalation, settings.node, self._topics, self._alarm_escalation
        )
        self._answering = Answering(
            self._spool,
            self._serving,
            settings.node,
            self._topics,
            on_probation=lambda: self._updater.reported().state in UNPROVEN,
            escalation=self._escalating,
        )
        self._uplink = MqttUplink(
            settings.mqtt,
            self._topics,
            self._spool,
            self,
            drain_per_s=settings.spool.drain_per_s,
            takes_answers=settings.escalation.mqtt,
        )
        self._notifier = Notifier()
        self._next_telemetry_s = 0.0

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set, then drain: finish the event at hand, publish ``offline``, close the files."""
        updating = threading.Thread(target=self._updater.run, args=(stop,), name="updater", daemon=True)
        try:
            # The last good model answers before anything else is tried: no network is needed for it.
            self._updater.resume()
            self._serve_active()
            self._allow_time()
            self._uplink.start()
            self._escalating.escalator.start()
            updating.start()
            self._notifier.ready(self._headline())
            _log.info("ready", version=VERSION, node=self._topics.base, model=self._model_name())
            while not stop.is_set():
                self._turn(stop)
        finally:
            _log.info("stopping")
            stop.set()
            self._draining = True
            self._notifier.stopping()
            self._exchange.stop_trial()
            self._escalating.escalator.stop()
            self._uplink.stop()
            if updating.ident is not None:
                updating.join(timeout=10.0)
            self._serving.stop()
            self._spool.close()
            os.close(self._state_lock)
            _log.info("stopped")

    def _turn(self, stop: threading.Event) -> None:
        """One turn of the loop. The watchdog is fed here and only here: by an answer or by an idle look around."""
        # Cleared before looking: an event that arrives in between sets it again.
        self._spool.inbox_changed.clear()
        step = self._answering.step()
        if self._spool.is_corrupt:
            # Also where only the intake met it: the node would be deaf, and look healthy.
            raise IntegrityError("spool.corrupt", "the spool is damaged; the next start moves it aside")
        fault = self._serving.start_fault
        if isinstance(fault, IntegrityError) and self._updater.reported().state not in UNPROVEN:
            # Time does not cure it. The next start falls back to the bundle before this one.
            raise fault
        self._notifier.progress()
        if step is Step.IDLE:
            self._keep_worker()
            self._spool.inbox_changed.wait(IDLE_WAIT_S)
        elif step is Step.BLOCKED:
            stop.wait(BLOCKED_WAIT_S)
        if time.monotonic() >= self._next_telemetry_s:
            self._next_telemetry_s = time.monotonic() + self._settings.telemetry.period_s
            self._publish_telemetry()

    def _keep_worker(self) -> None:
        if self._serving.ready:
            try:
                self._serving.keep_alive()
            except EdgeError as error:
                _log.error("worker_not_restarted", error=error)

    def _allow_time(self) -> None:
        """The longest turn restarts the worker and then waits for an answer until its deadline."""
        model = self._serving.model
        deadline_s = max((task.deadline_ms / 1000 for task in model.tasks.values()), default=0.0) if model else 0.0
        self._notifier.allow(self._settings.worker.start_timeout_s + deadline_s + _TURN_SPARE_S)

    def _serve_active(self) -> None:
        """Start the worker on the active slot, else on the one before it.

        A fault raises an alarm; the daemon lives on, so that an order can mend it.
        """
        slots, is_damaged = self._updater.slots, False
        for slot_of in (slots.active, slots.previous):
            try:
                bundle = slot_of()
                if bundle is None:
                    continue
                self._notifier.extend_timeout(self._settings.worker.start_timeout_s + _TURN_SPARE_S)
                self._serving.exchange(bundle.path, bundle.digest)
                if is_damaged:
                    # An update must go into the damaged slot, and not into the one that answers.
                    self._updater.disown_active()
                return
            except EdgeError as error:
                is_damaged = isinstance(error, IntegrityError)
                _log.error("bundle_not_served", error=error)
                self._alarmed = True
                alarm = json.dumps(error.as_dict(), default=str).encode()
                self._uplink.publish_retained(self._topics.alarm(MODEL_ALARM), alarm)

    # ---- what the uplink asks (edge_agent.uplink.ports.UplinkPorts)

    def status(self, state: Literal["online", "draining", "offline"]) -> bytes:
        """Payload of the ``status`` topic."""
        if state == "online" and self._draining:
            state = "draining"
        status = Status(state=state, boot_id=self._boot_id, since_ms=self._since_ms, version=VERSION)
        return status.model_dump_json().encode()

    def on_event(self, task: str, payload: bytes) -> None:
        """Take one event (see `Accepting.on_event`)."""
        self._accepting.on_event(task, payload)

    def on_escalation_answer(self, task: str, decision_id: str, payload: bytes) -> None:
        """Hand an answer to the escalator."""
        self._escalating.escalator.take_answer(task, decision_id, payload)

    def on_desired(self, envelope: bytes) -> None:
        """Hand the desired state to the updater; an empty one changes nothing: the node keeps its model."""
        self._updater.on_desired(envelope)

    def on_connected(self) -> Sequence[tuple[str, bytes]]:
        """Retained messages that follow the birth."""
        reported = self._updater.reported()
        return [
            (self._topics.meta, self._meta().model_dump_json().encode()),
            (self._topics.model_reported, reported.model_dump_json().encode()),
        ]

    # ---- publications

    def _meta(self) -> Meta:
        model, facts = self._serving.model, self._serving.last_facts
        return Meta(
            version=VERSION,
            hardware=hardware_facts(),
            execution_providers=facts.providers if facts else (),
            tasks=tuple(model.tasks) if model else (),
            worker_threads=facts.threads if facts else None,
        )

    def _publish_reported(self, reported: Reported) -> None:
        self._uplink.publish_retained(self._topics.model_reported, reported.model_dump_json().encode())
        self._notifier.status(self._headline())

    def _announce_model(self) -> None:
        """Another model may bring other tasks, and cures the alarm about one that could not be served."""
        if self._alarmed and self._serving.model is not None:
            self._uplink.publish_retained(self._topics.alarm(MODEL_ALARM), b"")
            self._alarmed = False
        self._allow_time()
        self._uplink.publish_retained(self._topics.meta, self._meta().model_dump_json().encode())

    def _alarm_escalation(self, error: EdgeError | None) -> None:
        alarm = b"" if error is None else json.dumps(error.as_dict(), default=str).encode()
        self._uplink.publish_retained(self._topics.alarm(ESCALATION_ALARM), alarm)

    def _publish_telemetry(self) -> None:
        counts = self._serving.counts()
        inference = InferenceTelemetry(
            decisions=counts.decisions,
            errors=counts.errors,
            worker_deaths=self._serving.deaths_total,
            workers_outgrown=self._serving.outgrown_total,
            p50_ms=counts.latency_ms(0.50),
            p95_ms=counts.latency_ms(0.95),
            passes_per_decision=counts.passes / counts.decisions if counts.decisions else None,
            timestamp_ms=now_ms(),
        )
        try:
            hardware = hardware_telemetry(self._settings.state_dir, worker_pid=self._serving.worker_pid)
            queue = self._spool.counts()
        except EdgeError as error:
            _log.warning("telemetry_incomplete", error=error)
            return
        for kind, payload in (("hw", hardware), ("inference", inference), ("queue", queue)):
            self._uplink.publish_telemetry(self._topics.tele(kind), payload.model_dump_json().encode())

    def _model_name(self) -> str | None:
        model = self._serving.model
        return f"{model.ref.name} {model.ref.version}" if model else None

    def _headline(self) -> str:
        return f"model: {self._model_name() or 'none yet'}"


def run_daemon(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT.

    Returns:
        0 after an orderly stop.

    Raises:
        EdgeError: the daemon could not start.
    """
    configure(settings.log)
    os.umask(0o027)  # events and decisions are not for everyone on the machine
    stop = threading.Event()

    def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
        # Nothing is logged here: the main thread may be inside the logger, whose lock it would wait for ever for.
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    Agent(settings).run(stop)
    return 0


def _claim_state_dir(settings: Settings) -> int:
    """Make the directory and lock it: two daemons would install over each other's slots; the lock's descriptor."""
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise from_os_error(error, "creating the state directory") from error
    if not os.access(settings.state_dir, os.W_OK | os.X_OK):
        raise PermanentError("disk.permission", f"{settings.state_dir} is not writable", path=str(settings.state_dir))
    try:
        lock = os.open(settings.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise from_os_error(error, "locking the state directory") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError as error:
        os.close(lock)
        raise PermanentError(
            "spool.in_use", f"another edge-agent runs on {settings.state_dir}", path=str(settings.state_dir)
        ) from error
    return lock
