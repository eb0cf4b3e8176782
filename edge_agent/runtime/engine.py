"""Events in, answers out, in this process: the one implementation that command line, export and worker share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from edge_agent.contract.event import Event
from edge_agent.contract.routing import check_routing
from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.errors import EdgeError, RefusedError
from edge_agent.runtime.adapter import task_adapter
from edge_agent.runtime.answer import Answer, WorkerFacts
from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.drafts import PassCost
from edge_agent.runtime.kv_cache import KvCache
from edge_agent.runtime.large_pages import LargePages
from edge_agent.runtime.loading import LoadedModel, load_model
from edge_agent.runtime.memory import rss_bytes
from edge_agent.runtime.prefix_store import PrefixStore
from edge_agent.runtime.prepared import PreparedTask, Question
from edge_agent.runtime.prompt import EventPrompt, cut_by_template, event_prompt, rendered_event
from edge_agent.runtime.routing import OwnAnswer
from edge_agent.runtime.routing import decide as decide_routed
from edge_agent.runtime.session import resolve_threads
from edge_agent.runtime.speed import Speed
from edge_agent.runtime.static_session import StaticCache, StaticSession
from edge_agent.runtime.task_files import ReadTask


class Engine:
    """A loaded bundle. Not thread-safe: one call at a time.

    Args:
        bundle: verified; nothing else is ever loaded.
        threads: intra-op threads; 0 chooses by `resolve_threads`.
        speed: what is done to be fast.
        loaded: of `load_model`, with the same bundle, threads and prefixes; None: it is loaded here.

    Raises:
        IntegrityError: ``bundle.file_missing`` or ``bundle.file_corrupt``.
        PermanentError: ``bundle.unsupported``, ``adapter.invalid``, ``task.*``, ``worker.out_of_memory``,
            ``worker.bad_logits``.
    """

    def __init__(
        self,
        bundle: VerifiedBundle,
        threads: int = 0,
        speed: Speed = Speed(),  # noqa: B008 - frozen
        loaded: LoadedModel | None = None,
    ) -> None:
        started_s = time.monotonic()
        self.bundle = bundle
        self._speed = speed
        self._prefixes = PrefixStore(speed.prefix_dir)
        self._cost = PassCost()
        self._pages = LargePages() if speed.large_pages else None
        self.threads = resolve_threads(threads)
        loaded = loaded or load_model(bundle, self.threads, self._prefixes)
        self._session, self._encoder = loaded.session, loaded.encoder
        self._tasks = {task.spec.name: self._prepare(task) for task in loaded.tasks}
        check_routing(self.tasks)
        self._load_s = time.monotonic() - started_s

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """The tasks that can be decided, by name."""
        return {name: prepared.task.spec for name, prepared in self._tasks.items()}

    @property
    def control_ids(self) -> frozenset[int]:
        """Token ids that no event can produce."""
        return self._encoder.control_ids

    def facts(self) -> WorkerFacts:
        """What was loaded, and what it took."""
        return WorkerFacts(
            load_s=self._load_s,
            rss_bytes=rss_bytes() or 0,
            providers=self._session.providers,
            tasks=tuple(self._tasks),
            prefix_tokens={name: task.prefix_tokens for name, task in self._tasks.items()},
            threads=self.threads,
            together=min((task.rows for task in self._tasks.values()), default=1),
        )

    def prepared(self, task: str) -> PreparedTask:
        """The prepared task.

        Raises:
            RefusedError: ``task.unknown``.
        """
        try:
            return self._tasks[task]
        except KeyError:
            known = ", ".join(self._tasks)
            raise RefusedError("task.unknown", f"no task {task!r} in this bundle; it has: {known}") from None

    def golden(self, task: str) -> list[GoldenExample]:
        """The task's golden examples (none when the bundle lists no file of them)."""
        return list(self.prepared(task).task.golden)

    def decide(self, task: str, event: Event, *, deadline_s: float) -> Answer:
        """Decide one event, with the specialist and the check that the task declares.

        Args:
            task: one of `tasks`.
            event: a flat event.
            deadline_s: seconds from now after which no further pass begins, and the one under way ends.

        Returns:
            A schema-valid answer.

        Raises:
            RefusedError: ``task.unknown``, ``event.*``.
            PermanentError: ``worker.deadline``, ``worker.bad_logits``, ``worker.out_of_memory``, ``worker.inference``.
        """
        (answer,) = self.decide_many(task, [event], deadline_s=deadline_s)
        if isinstance(answer, EdgeError):
            raise answer
        return answer

    def decide_many(self, task: str, events: Sequence[Event], *, deadline_s: float) -> list[Answer | EdgeError]:
        """Decide events that wait, several in a pass where the graph allows it.

        An event is answered as it would be alone; a confidence may differ in its last digits (`Lane.take`).

        Args:
            task: one of `tasks`.
            events: flat events, the most urgent first.
            deadline_s: seconds from now after which no further pass begins, and the one under way ends.

        Returns:
            For each event its answer, or the fault that it alone had (as `decide` raises).

        Raises:
            RefusedError: ``task.unknown``.
        """
        started_s = time.monotonic()
        deadline_at_s = started_s + deadline_s
        found: list[Answer | EdgeError] = []
        for event, own in zip(events, self._own_answers(task, events, deadline_at_s), strict=True):
            try:
                if isinstance(own, EdgeError):
                    raise own
                found.append(
                    decide_routed(self._own_answer, own, event, started_s=started_s, deadline_at_s=deadline_at_s)
                )
            except EdgeError as error:
                found.append(error)
        if self._pages is not None:
            self._pages.gather_once()
        return found

    def _own_answer(self, task: str, event: Event, deadline_at_s: float) -> OwnAnswer:
        (own,) = self._own_answers(task, [event], deadline_at_s)
        if isinstance(own, EdgeError):
            raise own
        return own

    def _own_answers(self, task: str, events: Sequence[Event], deadline_at_s: float) -> list[OwnAnswer | EdgeError]:
        """What one task's model says of events, each by itself: from memory, or in passes that they share."""
        prepared = self.prepared(task)
        spec, calibration = prepared.task.spec, prepared.task.calibration
        found: dict[int, OwnAnswer | EdgeError] = {}
        waiting: list[tuple[int, str, EventPrompt]] = []
        for place, event in enumerate(events):
            try:
                rendered = rendered_event(spec, event)
                known = prepared.answers.get(rendered)
                if known is None:
                    prompt = event_prompt(spec, event, self._encoder.encode, rendered)
                    waiting.append((place, rendered, prompt))
                else:
                    truncated = cut_by_template(spec, event)
                    found[place] = OwnAnswer(spec, calibration, known, truncated, is_known=True)
            except EdgeError as error:
                found[place] = error
        for first in range(0, len(waiting), prepared.rows):
            together = waiting[first : first + prepared.rows]
            with self._session.limit.until(deadline_at_s):
                decoded = prepared.decode([Question(prompt.ids, deadline_at_s) for _, _, prompt in together])
            for (place, rendered, prompt), one in zip(together, decoded, strict=True):
                if isinstance(one, EdgeError):
                    found[place] = one
                    continue
                if not prompt.shortened:  # else the rendered text does not tell all that the model saw
                    prepared.answers.put(rendered, one)
                found[place] = OwnAnswer(spec, calibration, one, prompt.truncated)
        return [found[place] for place in range(len(events))]

    def encode_event(self, task: str, event: Event) -> list[int]:
        """Token ids of a rendered event, as `decide` would feed them."""
        return event_prompt(self.prepared(task).task.spec, event, self._encoder.encode).ids

    def encode_prefix(self, task: str) -> list[int]:
        """Token ids of a task's prefix, which every cache of the task begins with."""
        return list(self.prepared(task).task.prefix)

    def _prepare(self, task: ReadTask) -> PreparedTask:
        cache = self._new_cache(task.spec.name, task.capacity_tokens)
        self._fill(cache, task)
        # The state is in the cache now: what was mapped for it need not be held any longer.
        return PreparedTask(replace(task, state=None), cache, self._speed, self._cost)

    def _fill(self, cache: KvCache | StaticCache, task: ReadTask) -> None:
        """Bring the prefix into the cache: from the disk where its state was kept, else by a pass."""
        if not (isinstance(cache, KvCache) and cache.is_in_memory):
            cache.forward(task.prefix)
            return
        if task.state is None:
            cache.forward(task.prefix)
            self._prefixes.save(task.key, cache.read(0, 0, len(task.prefix)))
        else:
            cache.write(0, 0, task.state)
            cache.length = len(task.prefix)
        cache.share(len(task.prefix))

    def _new_cache(self, task: str, capacity_tokens: int) -> KvCache | StaticCache:
        if isinstance(self._session, StaticSession):  # has no adapters: the manifest could not say so
            return self._session.new_cache(capacity_tokens)
        arrays = task_adapter(self.bundle.path, self.bundle.manifest.model, task)
        adapter = self._session.load_adapter(arrays) if arrays else None
        rows = self._speed.together if self._session.spec.score_at else 1
        return self._session.new_cache(capacity_tokens, rows, adapter)
