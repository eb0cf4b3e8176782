"""Random weights that answer as a trained model does: all of the work, and somebody else's words.

Random weights answer nearly every event alike. An engine that guesses answers and checks them would look faster than it
is, for its guesses would nearly always be right. So before the engine sees a pass's scores, the token is raised that
the trained reference model's answer has next. Every pass is run as ever, right guesses and wrong ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

# Before onnxruntime is imported: its official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError
from edge_agent.runtime.answer import Answer
from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.grammar import AnswerPlan, Branch, ClosedField, Done, Tokens
from edge_agent.runtime.head_rows import HeadRows, read_head_rows
from edge_agent.runtime.kv_cache import Adapter, KvCache, Logits, RowPass
from edge_agent.runtime.loading import load_model
from edge_agent.runtime.prefix_store import PrefixStore
from edge_agent.runtime.session import ModelSession
from edge_agent.runtime.speed import Speed

CERTAIN = np.float32(1e3)
"""Added to a score, it leaves no doubt."""


class Dictation:
    """What each row's text is to become.

    Args:
        head: the tokens that can be chosen.

    Attributes:
        start: length of the prefix, behind which texts begin.
        texts: for each row the tokens of event and answer.
    """

    def __init__(self, head: HeadRows) -> None:
        self._head = head
        self.start = 0
        self.texts: list[list[int]] = []

    def raise_scores(self, one: RowPass, scores: Logits) -> None:
        """Raise what comes next, wherever a pass agrees with the row's text.

        Args:
            one: the pass of one row.
            scores: float32 (scores, head rows), changed in place.
        """
        text, first = self.texts[one.row], len(one.tokens) - len(one.follows)
        for at, row in zip(one.score_at, scores, strict=True):
            way = [at]  # offsets of the tokens that this one comes after, itself first
            while way[-1] > 0:
                way.append(way[-1] - 1 if way[-1] < first else first + one.follows[way[-1] - first])
            begin, tokens = one.past - self.start, [one.tokens[offset] for offset in reversed(way)]
            end = begin + len(tokens)
            if text[begin:end] == tokens and end < len(text) and text[end] in self._head:
                row[self._head.rows(np.array([text[end]]))] += CERTAIN


class DictatedCache(KvCache):
    """A cache whose passes are scored as `Dictation` has it."""

    dictation: Dictation

    def run(self, passes: Sequence[RowPass]) -> list[Logits]:
        """As `KvCache.run`."""
        found = super().run(passes)
        for one, scores in zip(passes, found, strict=True):
            self.dictation.raise_scores(one, scores)
        return found


class DictatedSession(ModelSession):
    """A loaded model with such caches.

    Args:
        session: as it was loaded.
        dictation: of its only task.
    """

    def __init__(self, session: ModelSession, dictation: Dictation) -> None:
        vars(self).update(vars(session))
        self._dictation = dictation

    def new_cache(self, capacity_tokens: int, rows: int = 1, adapter: Adapter | None = None) -> KvCache:
        """As `ModelSession.new_cache`."""
        adapter = self._no_adapter if adapter is None else adapter
        cache = DictatedCache(self._graphs, capacity_tokens, rows, adapter)
        cache.dictation = self._dictation
        return cache


class DictatedEngine:
    """An engine that answers every event as it is told.

    Args:
        bundle: verified.
        threads: intra-op threads.
        speed: the engine's levers.
        decisions: event, as `key_of` names it -> what is to be answered.

    Attributes:
        engine: what answers, untold.
    """

    def __init__(
        self, bundle: VerifiedBundle, threads: int, speed: Speed, decisions: Mapping[str, Mapping[str, Any]]
    ) -> None:
        loaded = load_model(bundle, threads, PrefixStore(speed.prefix_dir))
        assert isinstance(loaded.session, ModelSession)
        self._dictation = Dictation(_head_of(bundle))
        session = DictatedSession(loaded.session, self._dictation)
        self.engine = Engine(bundle, threads, speed, replace(loaded, session=session))
        self._decisions = decisions
        self.encode_prefix, self.encode_event = self.engine.encode_prefix, self.engine.encode_event

    def decide(self, task: str, event: Event, *, deadline_s: float) -> Answer:
        """As `Engine.decide`.

        Raises:
            AssertionError: the engine answered something else: then nothing was measured.
        """
        (found,) = self.decide_many(task, [event], deadline_s=deadline_s)
        if isinstance(found, EdgeError):
            raise found
        return found

    def decide_many(self, task: str, events: Sequence[Event], *, deadline_s: float) -> list[Answer | EdgeError]:
        """As `Engine.decide_many`, with as many at once as the engine itself would take."""
        prepared = self.engine.prepared(task)
        self._dictation.start = prepared.prefix_tokens
        found: list[Answer | EdgeError] = []
        for first in range(0, len(events), prepared.rows):
            group = events[first : first + prepared.rows]
            wanted = [self._decisions[key_of(event)] for event in group]
            self._dictation.texts = [
                [*self.encode_event(task, event), *spelled(prepared.task.plan, decision)]
                for event, decision in zip(group, wanted, strict=True)
            ]
            answers = self.engine.decide_many(task, group, deadline_s=deadline_s)
            for answer, decision in zip(answers, wanted, strict=True):
                assert isinstance(answer, EdgeError) or answer.decision == decision, "it answered something else"
            found += answers
        return found


def key_of(event: Event) -> str:
    """An event's name among others."""
    return json.dumps(event, sort_keys=True)


def spelled(plan: AnswerPlan, decision: Mapping[str, Any]) -> list[int]:
    """Token ids of an answer as the engine writes it.

    Raises:
        ValueError: the plan has no such answer.
        TypeError: it leaves a field open.
    """
    tokens = list(plan.opening)
    for planned in plan.fields:
        if not isinstance(planned, ClosedField):
            raise TypeError(f"{planned.name} is open")
        way = _way_to(planned.root, decision[planned.name])
        if way is None:
            raise ValueError(f"{planned.name} is never {decision[planned.name]!r}")
        tokens += (*planned.forced, *way)
    return tokens


def _way_to(node: Branch | Done, value: object) -> Tokens | None:
    if isinstance(node, Done):
        return () if node.value == value and type(node.value) is type(value) else None
    for token, edge in zip(node.ids.tolist(), node.edges, strict=True):
        way = _way_to(edge.target, value)
        if way is not None:
            return (token, *edge.forced, *way)
    return None


def _head_of(bundle: VerifiedBundle) -> HeadRows:
    model = bundle.manifest.model
    return read_head_rows(model.vocab_size, bundle.path / model.head_ids if model.head_ids else None)
