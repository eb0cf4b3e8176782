"""No sequence of signals and power cuts loses the bundle that serves.

The world is a model of what the driver does to the disk, cut off at any point; the rules under test are the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.contract.messages import DesiredState, ErrorInfo
from edge_agent.update.machine import (
    ENDS,
    RULES,
    Action,
    DeadlinePassed,
    Desired,
    Failed,
    Record,
    Resumed,
    Signal,
    Stopped,
    Succeeded,
    step,
)

ERROR = ErrorInfo(code="x.y", type="transient", detail="z")


@dataclass
class Slot:
    digest: str | None = None
    whole: bool = False
    good: bool = False


class Device(RuleBasedStateMachine):
    """Signals in any order, work that succeeds, fails or is cut off in its middle, power cuts everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = [Slot(), Slot()]
        self.active: int | None = None  # the pointer file
        self.journal = Record()
        self.record = Record()
        self.pending: list[Action] = []
        self.serving: str | None = None
        self.rev = 0

    # -- the driver, in miniature ----------------------------------------------------------------------------------

    def apply(self, signal: Signal) -> None:
        before = self.record
        self.record, actions = step(before, signal)
        self.journal = self.record  # persisted before anything is done
        if actions or self.record.phase != before.phase:
            self.pending = list(actions)

    def boot(self) -> None:
        self.record = Record.model_validate_json(self.journal.model_dump_json())
        self.serving = None if self.active is None else self.slots[self.active].digest
        self.pending = []
        self.apply(Resumed())

    @property
    def inactive(self) -> int:
        return 0 if self.active is None else 1 - self.active

    def perform(self, action: Action, *, cut: bool) -> None:
        """The effect of an action on the disk; with ``cut`` only its first half."""
        digest = self.record.request.digest if self.record.request else None
        slot = self.slots[self.inactive]
        if action is Action.INSTALL:
            slot.good = False
            slot.digest, slot.whole = digest, not cut
        elif action is Action.PROBATION and not cut:
            self.serving = digest
        elif action is Action.COMMIT:
            found = next((i for i, s in enumerate(self.slots) if s.whole and s.digest == digest), None)
            assert found is not None, "committing a bundle that is not there"
            self.slots[found].good = True
            if not cut:
                self.active = found
                self.serving = digest
        elif action is Action.ROLL_BACK and not cut:
            self.serving = None if self.active is None else self.slots[self.active].digest

    # -- what can happen -------------------------------------------------------------------------------------------

    @rule(digest=st.sampled_from("abc"), newer=st.booleans())
    def desired(self, digest: str, *, newer: bool) -> None:
        self.rev += 1 if newer else 0
        rev = max(self.rev, 1)
        if rev < self.record.rev_seen:
            return
        path = f"triage/{rev}/cpu-x86_64/manifest.json"
        not_after = datetime(2030, 1, 1, tzinfo=UTC)
        self.apply(Desired(DesiredState(node="n", rev=rev, release=path, digest=digest * 64, not_after=not_after)))

    @precondition(lambda self: self.pending)
    @rule()
    def work_succeeds(self) -> None:
        action = self.pending.pop(0)
        self.perform(action, cut=False)
        if action is not Action.WAIT:
            self.apply(Succeeded())

    @precondition(lambda self: self.pending)
    @rule(half=st.booleans(), retryable=st.booleans())
    def work_fails(self, *, half: bool, retryable: bool) -> None:
        action = self.pending.pop(0)
        if half:
            self.perform(action, cut=True)
        self.apply(Failed(ERROR, retryable=retryable))

    @precondition(lambda self: self.pending)
    @rule()
    def power_cut_before_the_work(self) -> None:
        self.boot()

    @precondition(lambda self: self.pending)
    @rule()
    def power_cut_in_the_middle_of_the_work(self) -> None:
        self.perform(self.pending[0], cut=True)
        self.boot()

    @precondition(lambda self: self.pending)
    @rule()
    def power_cut_after_the_work(self) -> None:
        self.perform(self.pending[0], cut=False)
        self.boot()

    @rule()
    def power_cut_while_waiting(self) -> None:
        self.boot()

    @rule()
    def clean_restart(self) -> None:
        self.apply(Stopped())
        self.boot()

    @rule()
    def time_is_up(self) -> None:
        self.apply(DeadlinePassed())

    # -- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def the_active_slot_is_whole_and_good(self) -> None:
        if self.active is not None:
            slot = self.slots[self.active]
            assert slot.whole
            assert slot.good

    @invariant()
    def what_serves_is_whole(self) -> None:
        if self.serving is not None:
            assert (
                any(slot.whole and slot.digest == self.serving for slot in self.slots) or self.record.phase not in ENDS
            )

    @invariant()
    def a_working_state_has_work_queued_and_an_end_has_none(self) -> None:
        assert bool(self.pending) == (self.record.phase in RULES)

    @invariant()
    def every_working_state_has_an_exit(self) -> None:
        record = self.record
        for _ in range(4):
            record, _ = step(record, DeadlinePassed())
        assert record.phase in ENDS

    @invariant()
    def crashing_forever_ends(self) -> None:
        record = self.record
        for _ in range(2 + sum(rule_.resumes + 1 for rule_ in RULES.values())):
            record, _ = step(record, Resumed())
        assert record.phase in ENDS

    @invariant()
    def memory_and_journal_agree(self) -> None:
        assert self.journal == self.record


TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
