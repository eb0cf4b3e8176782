"""A task made ready for one engine: everything that does not depend on the event, and what is learned from events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_agent.contract.output import TextField
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.runtime.decision_cache import DecisionCache
from edge_agent.runtime.decoder import Decoded, Lane, decode
from edge_agent.runtime.drafts import AnswerDrafts, PassCost
from edge_agent.runtime.event_cache import EventCache
from edge_agent.runtime.kv_cache import KvCache
from edge_agent.runtime.lanes import run_lanes
from edge_agent.runtime.speed import Speed
from edge_agent.runtime.static_session import StaticCache
from edge_agent.runtime.task_files import ReadTask


@dataclass(frozen=True)
class Question:
    """An event that is to be decided.

    Args:
        prompt: its token ids.
        deadline_at_s: `time.monotonic` after which no further pass begins.
    """

    prompt: list[int]
    deadline_at_s: float


@dataclass(frozen=True)
class PreparedTask:
    """A task with everything that does not depend on the event.

    Args:
        task: as its files say it.
        cache: holds the prefix; every event starts at its end again.
        speed: which levers are used.
        cost: of passes; shared by all tasks of a model.
    """

    task: ReadTask
    cache: KvCache | StaticCache
    speed: Speed
    cost: PassCost = field(default_factory=PassCost)
    answers: DecisionCache = field(init=False)
    events: EventCache = field(init=False)
    drafts: AnswerDrafts | None = field(init=False)

    def __post_init__(self) -> None:
        remembered_bytes = self.speed.decision_cache_bytes if self.task.spec.cache else 0
        has_text = any(isinstance(output, TextField) for output in self.task.spec.output_fields)
        object.__setattr__(self, "answers", DecisionCache(remembered_bytes))
        object.__setattr__(self, "events", EventCache(self.speed.event_cache_bytes))
        drafts = AnswerDrafts(self.cost, copies=has_text, remembers=self.speed.drafts)
        guesses = self.speed.drafts or self._takes_alternatives
        object.__setattr__(self, "drafts", drafts if guesses else None)

    @property
    def _takes_alternatives(self) -> bool:
        return self.speed.alternatives and isinstance(self.cache, KvCache) and self.cache.takes_alternatives

    @property
    def prefix_tokens(self) -> int:
        """Length of the prefix in the cache."""
        return len(self.task.prefix)

    @property
    def rows(self) -> int:
        """Events that can be answered together."""
        return self.cache.rows if isinstance(self.cache, KvCache) else 1

    def decode(self, questions: Sequence[Question]) -> list[Decoded | EdgeError]:
        """Answer at most `rows` events together.

        Returns:
            For each its answer, or the fault that kept it from one; one event's fault is no other's.
        """
        cache = self.cache
        if isinstance(cache, KvCache) and cache.scores_many:
            found = self._decode_in_lanes(cache, questions)
        else:
            found = [self._decode_alone(question) for question in questions]
        if any(isinstance(one, EdgeError) and one.code == "worker.bad_logits" for one in found):
            self.restore_prefix()
        return found

    def forget(self) -> None:
        """Forget the events so far; what was learned about answers and passes stays."""
        self.events.clear()
        self.answers.clear()

    def restore_prefix(self) -> None:
        """Compute the prefix anew: a fault may have left numbers in the caches that would spoil every later event.

        Raises:
            EdgeError: the model cannot even run the prefix.
        """
        self.events.clear()
        self.cache.rewind(0)
        self.cache.forward(self.task.prefix)
        if isinstance(self.cache, KvCache):
            self.cache.share(self.prefix_tokens)

    def _decode_in_lanes(self, cache: KvCache, questions: Sequence[Question]) -> list[Decoded | EdgeError]:
        start, temperatures = self.prefix_tokens, self.task.calibration.temperatures
        room_tokens = cache.capacity_tokens - start
        lanes = []
        for row, question in enumerate(questions):
            seen = self.events.restore(cache, row, start, question.prompt)
            given = (question.prompt, temperatures, question.deadline_at_s, self.drafts)
            lanes.append(Lane(self.task.plan, *given, room_tokens=room_tokens, seen=seen))
        faults = run_lanes(cache, start, lanes, self.cost, alternatives=self._takes_alternatives)
        found: list[Decoded | EdgeError] = []
        for row, (question, lane, fault) in enumerate(zip(questions, lanes, faults, strict=True)):
            if fault is not None or lane.decoded is None:
                found.append(fault or PermanentError("worker.internal", "an answer was left unfinished"))
                continue
            found.append(lane.decoded)
            self.events.learn(cache, row, start, question.prompt)
            if self.drafts is not None:
                self.drafts.learn(lane.decoded.tokens, lane.decoded.asked, question.prompt)
        return found

    def _decode_alone(self, question: Question) -> Decoded | EdgeError:
        self.cache.rewind(self.prefix_tokens)
        try:
            return decode(
                self.cache, self.task.plan, question.prompt, self.task.calibration.temperatures, question.deadline_at_s
            )
        except EdgeError as error:
            return error
