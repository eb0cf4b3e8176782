"""Drives pending escalations to their end: asks, waits, falls back. The agent's loop never waits for any of it.

One thread looks after all of them; up to ``concurrency`` others put questions to the server. Whatever they do, an
escalation ends when its time is up: the looking thread settles it, and an answer that comes later is dropped, and
counted. What they know lives in the store: a daemon that was killed goes on from there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_when_event_set,
    wait_fixed,
    wait_random_exponential,
)
from tenacity.nap import sleep_using_event

from edge_agent.contract.escalation import Destination
from edge_agent.contract.escalation_messages import Escalation, Outcome
from edge_agent.contract.event import printable
from edge_agent.contract.messages import Decision, now_ms
from edge_agent.errors import EdgeError, RefusedError, TransientError
from edge_agent.escalation.answers import answer_of_payload, answer_of_text, checked, ended
from edge_agent.escalation.ports import Asker, Case, Clock, Store
from edge_agent.escalation.rules import Moment, Verdict, Waiting, judge, left_ms
from edge_agent.log import get_logger
from edge_agent.settings import EscalationSettings

# The longest pause between two looks; a look costs one query.
LOOK_S = 5.0
WRITE_RETRY_S = 1.0
STOP_S = 3.0
# Longer wishes of a server are cut to this: one absurd header must not silence a node for days.
PATIENCE_MAX_S = 600
# Faults that time does not cure: a person must act.
ALARMING = frozenset({"escalation.denied", "escalation.tls_untrusted", "escalation.key_file", "escalation.ca_file"})
_PAUSE = wait_random_exponential(multiplier=0.5, max=10.0)
_log = get_logger(__name__)


class Escalator:
    """The pending escalations of one node. ``wake``, ``is_open`` and ``take_answer`` may be called from any thread.

    Args:
        settings: which ways the site has opened.
        store: where escalations are kept.
        asker: the server; None where the settings name none.
        clock: time since the machine's start.
        on_fault: told of a fault that needs a person, and of None when the server has answered since.
    """

    def __init__(
        self,
        settings: EscalationSettings,
        store: Store,
        asker: Asker | None,
        clock: Clock,
        on_fault: Callable[[EdgeError | None], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._asker = asker
        self._clock = clock
        self._on_fault = on_fault
        self._is_faulty: bool | None = None  # None: an alarm may stand from before the start
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._asking: set[int] = set()
        self._not_before_ms = 0
        self._questions: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._last_hold: str | None = None
        askers = range(settings.concurrency if asker is not None else 0)
        self._threads = [threading.Thread(target=self._look_after, name="escalation", daemon=True)]
        self._threads += [threading.Thread(target=self._put, name=f"escalation-{n}", daemon=True) for n in askers]

    def start(self) -> None:
        """Go on with what an earlier life left, and with what comes."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End what is under way; what is pending stays so."""
        self._stopping.set()
        self._wake.set()
        if self._asker is not None:
            self._asker.abort()
        for _ in self._threads:
            self._questions.put(None)
        deadline_s = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def wake(self) -> None:
        """Look now: there is a new escalation."""
        self._wake.set()

    def is_open(self, to: Destination) -> bool:
        """Whether the site's settings open that way."""
        return self._settings.mqtt if to == "mqtt" else self._asker is not None

    # ---- answers over MQTT

    def take_answer(self, task: str, decision_id: str, payload: bytes) -> None:
        """Settle an escalation by a message from the answers' topic. What is no answer leaves the question open.

        Raises:
            TransientError: the spool cannot take it now; it may be delivered again.
        """
        escalation_id = self._store.find(task, decision_id)
        case = None if escalation_id is None else self._store.case(escalation_id)
        if case is None or case.waiting.to != "mqtt":
            self._drop_late(decision_id)
            return
        try:
            answer = answer_of_payload(payload)
            decision = None if answer.decision is None else checked(answer.decision, case.task)
        except RefusedError as error:
            self._store.count(error.code)
            _log.warning("escalation_answer_refused", decision_id=decision_id, error=error)
            return
        outcome: Outcome = "declined" if decision is None else "answered"
        by = None if answer.answered_by is None else printable(answer.answered_by)
        if not self._settle(case, self._ended(case, outcome, decision, answered_by=by)):
            self._drop_late(decision_id)

    # ---- the looking thread

    def _look_after(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                wait_s = self.look()
                self._last_hold = None
            except Exception as error:  # noqa: BLE001 - a defect costs one look, not the thread
                wait_s = WRITE_RETRY_S
                code = error.code if isinstance(error, EdgeError) else "escalation.failed"
                if code != self._last_hold:  # told once, not once a second
                    _log.exception("escalations_held", code=code)
                self._last_hold = code
            self._wake.wait(wait_s)

    def look(self) -> float:
        """Judge every pending escalation once.

        Returns:
            Seconds until the next of them is due.

        Raises:
            EdgeError: the last fault that one of them met; it is tried again.
        """
        soonest_ms, fault = round(LOOK_S * 1000), None
        for waiting in self._store.waiting():
            now = self._clock.now()
            soonest_ms = min(soonest_ms, max(0, left_ms(waiting, now)))
            try:
                self._act(waiting, now)
            except EdgeError as error:
                fault = error  # what is wrong with one must not hold up those behind it
        if fault is not None:
            raise fault
        return soonest_ms / 1000

    def _act(self, waiting: Waiting, now: Moment) -> None:
        match judge(waiting, now, is_open=self.is_open(waiting.to)):
            case Verdict.ASK:
                self._ask(waiting.escalation_id)
            case Verdict.WAIT_ANEW:
                self._store.wait_anew(waiting.escalation_id, now)
                self._wake.set()
            case Verdict.EXPIRE:
                self._fall_back(waiting.escalation_id, "timed_out")
            case Verdict.CLOSE:
                self._fall_back(waiting.escalation_id, "not_configured")
            case Verdict.WAIT:
                pass

    def _ask(self, escalation_id: int) -> None:
        if self._clock.now().at_ms < self._not_before_ms:
            return
        with self._lock:
            is_idle = len(self._asking) < self._settings.concurrency
            if not is_idle or escalation_id in self._asking:
                return
            self._asking.add(escalation_id)
        self._questions.put(escalation_id)

    def _fall_back(self, escalation_id: int, outcome: Outcome) -> None:
        case = self._store.case(escalation_id)
        if case is not None:
            self._settle(case, self._ended(case, outcome, None))

    # ---- the asking threads

    def _put(self) -> None:
        while (escalation_id := self._questions.get()) is not None and not self._stopping.is_set():
            try:
                self._answer(escalation_id)
            except RetryError:
                return  # the daemon stops
            except Exception:  # noqa: BLE001 - a defect costs one question; it is put again, or its time runs out
                _log.exception("escalation_failed")
                self._stopping.wait(WRITE_RETRY_S)
            finally:
                with self._lock:
                    self._asking.discard(escalation_id)
                self._wake.set()

    def _answer(self, escalation_id: int) -> None:
        case = self._store.case(escalation_id)
        if case is None or self._asker is None:
            return
        try:
            text = self._text_of(case, self._asker)
            decision = self._ended(case, "answered", answer_of_text(text, case.task))
        except EdgeError as error:
            if self._stopping.is_set():
                return
            self._note_fault(error)
            _log.warning("escalation_unanswered", decision_id=case.guess.decision_id, error=error)
            decision = self._ended(case, _outcome(error), None, reason=error.code)
        if not self._settle_at_last(case, decision) and decision.route == "escalated":
            self._drop_late(case.guess.decision_id)

    def _text_of(self, case: Case, asker: Asker) -> str:
        def once() -> str:
            timeout_ms = left_ms(case.waiting, self._clock.now())
            if timeout_ms <= 0:
                raise TransientError("escalation.no_answer", "the time for an answer is over")
            self._store.note_attempt(case.waiting.escalation_id)
            try:
                text = asker.ask(case, timeout_ms / 1000)
            except TransientError as error:
                self._be_patient(error)
                raise
            self._note_fault(None)
            return text

        def is_over(state: RetryCallState) -> bool:
            # Not a moment later: an answer after the fallback is of no use.
            left_s = left_ms(case.waiting, self._clock.now()) / 1000
            return self._stopping.is_set() or left_s <= state.upcoming_sleep

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=_pause,
            stop=is_over,
            sleep=sleep_using_event(self._stopping),
            reraise=True,
        )
        return retrying(once)

    def _be_patient(self, error: TransientError) -> None:
        """A server that wants to be left alone means every question, not only the one that it refused."""
        wanted_s = min(error.context.get("retry_after_s", 0), PATIENCE_MAX_S)
        self._not_before_ms = max(self._not_before_ms, self._clock.now().at_ms + round(wanted_s * 1000))

    def _settle_at_last(self, case: Case, decision: Decision) -> bool:
        """As `_settle`; a full disk delays it, because the answer was paid for. Raises RetryError at the stop."""
        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=wait_fixed(WRITE_RETRY_S),
            sleep=sleep_using_event(self._stopping),
            stop=stop_when_event_set(self._stopping),
        )
        return retrying(self._settle, case, decision)

    # ---- ends

    def _ended(self, case: Case, outcome: Outcome, answer: dict[str, Any] | None, **facts: str | None) -> Decision:
        now, waiting = self._clock.now(), case.waiting
        is_one_wait = waiting.since.boot_id == now.boot_id and not waiting.power_cuts
        escalation = Escalation(
            to=waiting.to,
            outcome=outcome,
            latency_ms=float(now.at_ms - waiting.since.at_ms) if is_one_wait else None,
            model=self._settings.model if waiting.to == "http" else None,
            **facts,
        )
        return ended(case, escalation, answer, now_ms())

    def _settle(self, case: Case, decision: Decision) -> bool:
        is_ours = self._store.settle(case.waiting.escalation_id, decision)
        if is_ours:
            _log.info(
                "escalation_ended",
                decision_id=decision.decision_id,
                task=decision.task,
                route=decision.route,
                outcome=decision.escalation.outcome if decision.escalation else None,
                guards=decision.guards or None,
            )
        return is_ours

    def _drop_late(self, decision_id: str) -> None:
        self._store.count("escalation.answer_late")
        _log.info("escalation_answer_late", decision_id=decision_id)

    def _note_fault(self, error: EdgeError | None) -> None:
        is_faulty = error is not None and error.code in ALARMING
        if error is not None and not is_faulty:
            return
        with self._lock:
            is_news, self._is_faulty = is_faulty is not self._is_faulty, is_faulty
        if is_news:
            self._on_fault(error)


def _outcome(error: EdgeError) -> Outcome:
    if isinstance(error, RefusedError):
        return "rejected"
    return "timed_out" if isinstance(error, TransientError) else "failed"


def _pause(state: RetryCallState) -> float:
    """What the server asked for, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    wanted_s = error.context.get("retry_after_s") if isinstance(error, EdgeError) else None
    return float(wanted_s) if wanted_s is not None else float(_PAUSE(state))
