"""The update, as a pure state machine: what may follow what, how long it may take, how often it may be tried.

Rules:
 * `step` does no I/O. The driver persists the new record *before* it performs the actions, so after a power cut the
   record names the work to do again; every piece of work is idempotent.
 * The active pointer moves in one place only, the work of ``committing``. Until then it names the old bundle, so a
   power cut at any moment boots into a bundle that has served before.
 * Every state that has work has a deadline, a retry budget and a resume budget (the loop guard), and each of the
   three leads out of it.
 * A newer desired state supersedes. It waits only while the device is between two bundles (``committing``,
   ``rolling_back``), which is short.

``committing`` is internal: it is reported as ``probation``, because to the fleet nothing is decided yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from edge_agent.contract.messages import DesiredState, ErrorInfo, UpdateState

Phase = UpdateState | Literal["committing"]
MAX_REMEMBERED_BAD = 64


class Action(Enum):
    """What the driver does for a state. One state, one piece of work."""

    DOWNLOAD = "download"
    VERIFY = "verify"
    INSTALL = "install"
    TRIAL = "trial"
    PROBATION = "probation"
    COMMIT = "commit"
    ROLL_BACK = "roll_back"
    WAIT = "wait"


@dataclass(frozen=True)
class Rule:
    """One working state.

    Args:
        work: what the driver does in it.
        passed: the state after success.
        failed: the state when the work failed for good, took too long or brought the agent down too often.
        deadline_s: time allowed in one stay, measured by the monotonic clock since entry or restart of the agent.
        retries: how often a transient failure is tried again.
        resumes: the loop guard: how often the agent may come back into this state after it went down in it.
        blames: whether leaving by ``failed`` marks the model bad. Only what the model itself did on this device
            counts; a registry, a disk or a network proves nothing about a model.
    """

    work: Action
    passed: Phase
    failed: Phase
    deadline_s: float
    retries: int
    resumes: int
    blames: bool = False


_HOUR = 3600.0
RULES: dict[Phase, Rule] = {
    # state                work              passed         failed         deadline_s   retries  resumes  blames
    "downloading":  Rule(Action.DOWNLOAD,  "verifying",   "failed",         24 * _HOUR, 1000,     100),
    "verifying":    Rule(Action.VERIFY,    "installing",  "failed",              _HOUR,    5,      10),
    "installing":   Rule(Action.INSTALL,   "trial",       "failed",              _HOUR,    5,      10),
    "trial":        Rule(Action.TRIAL,     "probation",   "failed",              _HOUR,    2,       3,   blames=True),
    "probation":    Rule(Action.PROBATION, "committing",  "rolling_back", 168 * _HOUR,     2,       3,   blames=True),
    "committing":   Rule(Action.COMMIT,    "committed",   "rolling_back",        _HOUR,   20,      20),
    "rolling_back": Rule(Action.ROLL_BACK, "rolled_back", "failed",              _HOUR,   20,      20),
}  # fmt: skip
# Edges that are absent, and why:
#  trial -> committed            golden examples are few; only live events prove a model
#  trial -> rolling_back         nothing was swapped yet, so there is nothing to go back from
#  probation -> failed           the candidate is serving: the way out is through the old bundle
#  rolling_back -> probation     a model that was withdrawn comes back by a new order only
#  committed -> rolling_back     after the commit a fault is the fleet's decision, made by a new desired state
#  any state -> idle             idle means "never asked"; an end is told by name
#  failed -> trial, installing   a new attempt starts at the metadata, which may have been revoked meanwhile
ENDS: frozenset[Phase] = frozenset({"idle", "committed", "rolled_back", "failed"})
# States in which the device is between two bundles; a newer order waits for their end.
BETWEEN: frozenset[Phase] = frozenset({"committing", "rolling_back"})


class Record(BaseModel):
    """What is persisted: enough to know, after a power cut, what to do next.

    Args:
        phase: the state.
        request: the order being worked on, or last worked on.
        waiting: a newer order that waits for the end of a state in `BETWEEN`.
        attempts: transient failures in this state so far.
        resumes: times that the agent went down in this state.
        stopped: the agent was stopped on purpose in this state; the next start does not count as a resume.
        error: why the last order failed, or what is being retried.
        rev_seen: highest revision of an authentic order for this node. Older ones are replays.
        digest_seen: digest that came with it.
        bad: digest -> revision in which it failed on this device.
        committed: name -> version last committed, the floor for downgrades.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    phase: Phase = "idle"
    request: DesiredState | None = None
    waiting: DesiredState | None = None
    attempts: int = 0
    resumes: int = 0
    stopped: bool = False
    error: ErrorInfo | None = None
    rev_seen: int = 0
    digest_seen: str | None = None
    bad: dict[str, int] = {}
    committed: dict[str, str] = {}

    @model_validator(mode="after")
    def _work_has_an_order(self) -> Record:
        if self.request is None and self.phase in RULES:
            raise ValueError("a working state without an order")
        return self

    @property
    def state(self) -> UpdateState:
        """The state as the fleet knows it."""
        return "probation" if self.phase == "committing" else self.phase


@dataclass(frozen=True)
class Desired:
    """An order that passed admission (`admission.refusal` returned None)."""

    request: DesiredState


@dataclass(frozen=True)
class Refused:
    """An authentic order for this node that may not be carried out."""

    request: DesiredState
    error: ErrorInfo


@dataclass(frozen=True)
class Succeeded:
    """The state's work is done."""


@dataclass(frozen=True)
class AlreadyActive:
    """The download found that the ordered bundle is the active one."""


@dataclass(frozen=True)
class Failed:
    """The state's work failed."""

    error: ErrorInfo
    retryable: bool


@dataclass(frozen=True)
class DeadlinePassed:
    """The state's time is up."""


@dataclass(frozen=True)
class Resumed:
    """The agent started and found this record."""


@dataclass(frozen=True)
class Stopped:
    """The agent is being stopped on purpose."""


Signal = Desired | Refused | Succeeded | AlreadyActive | Failed | DeadlinePassed | Resumed | Stopped
Step = tuple[Record, tuple[Action, ...]]


def deadline_s(record: Record) -> float | None:
    """Seconds that the present state may last; None for an end.

    A probation that was ordered to be long is given four times its length to find enough events.
    """
    rule = RULES.get(record.phase)
    if rule is None:
        return None
    ordered_s = record.request.probation_s if record.phase == "probation" and record.request else 0.0
    return max(rule.deadline_s, 4 * ordered_s)


def step(record: Record, signal: Signal) -> Step:  # noqa: PLR0911 - one line per signal
    """One transition.

    Args:
        record: the persisted state.
        signal: what happened.

    Returns:
        The new record and the actions to perform after it was persisted, in order. No actions means: carry on with
        what is being done (same order) or wait for a signal (an end).
    """
    match signal:
        case Desired():
            return _on_desired(record, signal.request)
        case Refused():
            return _on_refused(record, signal)
        case _ if record.phase not in RULES:
            return record, ()  # the work was called off before its result came in
        case Succeeded():
            return _on_success(record, RULES[record.phase])
        case AlreadyActive():
            # Nothing to download, to try or to prove; committing also records the new revision.
            return _enter(record, "committing", error=None) if record.phase == "downloading" else (record, ())
        case Failed():
            return _on_failed(record, RULES[record.phase], signal)
        case DeadlinePassed():
            return _on_deadline(record, RULES[record.phase])
        case Resumed():
            return _on_resumed(record, RULES[record.phase])
        case Stopped():
            return record.model_copy(update={"stopped": True}), ()


def _on_desired(record: Record, request: DesiredState) -> Step:
    seen = record.model_copy(update={"rev_seen": request.rev, "digest_seen": request.digest})
    if record.phase in BETWEEN:
        return seen.model_copy(update={"waiting": request}), ()
    current = record.request
    if record.phase in RULES and current is not None and _same_release(current, request):
        # The same model under a newer revision (say, a later not_after): what was done so far stays done.
        return seen.model_copy(update={"request": request}), ()
    if record.phase == "probation":
        # Unproven is not bad: the candidate leaves without blame, and the newer order starts from the old bundle.
        left = seen.model_copy(update={"waiting": request, "error": _error("update.superseded", request.rev)})
        return _enter(left, "rolling_back", error=left.error)
    return _start(seen, request)


def _on_refused(record: Record, signal: Refused) -> Step:
    if record.phase not in ENDS:
        # What was ordered before, and is under way, goes on under its own revision. The refused order is judged again
        # when it is delivered again, so nothing about it needs to be remembered.
        return record, ()
    seen = record.model_copy(update={"rev_seen": signal.request.rev, "digest_seen": signal.request.digest})
    return _enter(seen.model_copy(update={"request": signal.request}), "failed", error=signal.error)


def _on_success(record: Record, rule: Rule) -> Step:
    if record.phase == "rolling_back" and record.waiting is not None:
        return _start(record, record.waiting)
    if record.phase == "committing":
        record = _with_commit(record)
        if record.waiting is not None:
            return _start(record, record.waiting)
    # rolled_back keeps the error: it says why.
    return _enter(record, rule.passed, error=record.error if record.phase == "rolling_back" else None)


def _on_failed(record: Record, rule: Rule, signal: Failed) -> Step:
    if signal.retryable and record.attempts < rule.retries:
        again = record.model_copy(update={"attempts": record.attempts + 1, "error": signal.error})
        return again, (Action.WAIT, rule.work)
    return _fail(record, rule, signal.error, blames=rule.blames)


def _on_deadline(record: Record, rule: Rule) -> Step:
    if record.phase == "probation":
        # Too few events in a week say nothing against the model: no blame, but no commit without proof either.
        error = ErrorInfo(code="update.probation_inconclusive", type="permanent", detail="too few events to judge by")
        return _fail(record, rule, error, blames=False)
    cause = f"; last: {record.error.code}: {record.error.detail}" if record.error else ""
    detail = f"{record.state} took longer than {rule.deadline_s:.0f} s{cause}"
    return _fail(record, rule, ErrorInfo(code="update.deadline", type="permanent", detail=detail), blames=rule.blames)


def _on_resumed(record: Record, rule: Rule) -> Step:
    if record.stopped:
        return record.model_copy(update={"stopped": False}), (rule.work,)
    if record.resumes >= rule.resumes:
        detail = f"the agent went down {record.resumes + 1} times in {record.state}"
        error = ErrorInfo(code="update.loop_guard", type="permanent", detail=detail)
        return _fail(record, rule, error, blames=rule.blames)
    return record.model_copy(update={"resumes": record.resumes + 1}), (rule.work,)


def _fail(record: Record, rule: Rule, error: ErrorInfo, *, blames: bool) -> Step:
    if blames and record.request is not None:
        bad = {**record.bad, record.request.digest: record.request.rev}
        record = record.model_copy(update={"bad": dict(list(bad.items())[-MAX_REMEMBERED_BAD:])})
    if record.phase == "rolling_back":
        error = ErrorInfo(code="update.rollback_failed", type=error.type, detail=f"{error.code}: {error.detail}")
        if record.waiting is not None:
            return _start(record, record.waiting)  # a newer model may be the cure
    return _enter(record, rule.failed, error=error)


def _start(record: Record, request: DesiredState) -> Step:
    return _enter(record.model_copy(update={"request": request, "waiting": None}), "downloading", error=None)


def _enter(record: Record, phase: Phase, *, error: ErrorInfo | None) -> Step:
    entered = record.model_copy(
        update={"phase": phase, "attempts": 0, "resumes": 0, "stopped": False, "error": error},
    )
    return entered, (RULES[phase].work,) if phase in RULES else ()


def _with_commit(record: Record) -> Record:
    if record.request is None:  # excluded by Record's own check
        return record
    name, version, *_ = record.request.release.split("/")
    bad = {digest: rev for digest, rev in record.bad.items() if digest != record.request.digest}
    return record.model_copy(update={"committed": {**record.committed, name: version}, "bad": bad})


def _same_release(one: DesiredState, other: DesiredState) -> bool:
    return (one.release, one.digest) == (other.release, other.digest)


def _error(code: str, rev: int) -> ErrorInfo:
    return ErrorInfo(code=code, type="permanent", detail=f"superseded by revision {rev}")
