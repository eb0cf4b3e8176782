"""What the escalator asks of the rest of the agent, which implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_agent.contract.event import Event
from edge_agent.contract.messages import Decision
from edge_agent.contract.task import TaskSpec
from edge_agent.escalation.rules import Moment, Waiting


@dataclass(frozen=True, slots=True)
class Case:
    """Everything about one pending escalation.

    Args:
        waiting: its wait.
        guess: the device's best guess, as it would be published.
        task: as it was when the device answered.
        event: the whole event; what may leave the device is `EscalationSpec.shared`.
    """

    waiting: Waiting
    guess: Decision
    task: TaskSpec
    event: Event


class Store(Protocol):
    """Where pending escalations are kept. Everything that writes raises `TransientError` on a full disk."""

    def waiting(self) -> Sequence[Waiting]:
        """Every pending escalation, the oldest first."""
        ...

    def case(self, escalation_id: int) -> Case | None:
        """The content of one; None when it was settled."""
        ...

    def find(self, task: str, decision_id: str) -> int | None:
        """The one that an answer is meant for; None when there is none (any more)."""
        ...

    def wait_anew(self, escalation_id: int, now: Moment) -> None:
        """Record that the wait begins anew."""
        ...

    def note_attempt(self, escalation_id: int) -> None:
        """Record that the question is about to be put."""
        ...

    def settle(self, escalation_id: int, decision: Decision) -> bool:
        """Publish ``decision`` in the escalation's place; False when somebody else has settled it."""
        ...

    def count(self, reason: str) -> None:
        """Count an answer that is dropped."""
        ...


class Asker(Protocol):
    """Something larger that can be asked over the network."""

    def ask(self, case: Case, timeout_s: float) -> str:
        """Put the question; the answer's text, unchecked.

        Raises:
            TransientError: it may answer later (``retry_after_s`` in the context where it said when).
            PermanentError: it will not.
        """
        ...

    def abort(self) -> None:
        """End what is under way, from any thread: the daemon stops."""
        ...


class Clock(Protocol):
    """Where the time comes from."""

    def now(self) -> Moment:
        """This moment."""
        ...
