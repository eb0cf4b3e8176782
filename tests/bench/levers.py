"""What each lever of the engine is worth: the same events with one lever more in each row.

    python -m tests.bench.levers                          # the 135M shape
    python -m tests.bench.levers --model reference --write    # rewrites its tables in docs/why-it-is-fast.md

All forms live in one process and take turns event by event, so that a machine whose speed drifts slows all of them
alike; figures are medians over the events. Two streams: held-out events (every one of another machine), and a simulated
plant of nine machines, whose events begin alike. Forms that learn from events have answered `HISTORY` of them before;
random weights answer as the trained model does (`tests.bench.dictated`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# Before onnxruntime is imported: its official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError
from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.decoder import decode
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.kv_cache import KvCache
from edge_agent.runtime.large_pages import gather_heap, keep_on_heap
from edge_agent.runtime.speed import PLAIN, Speed
from tests.bench.attempts import Missing
from tests.bench.cache import ROOT
from tests.bench.decision_contenders import OurBundle, make_own_bundles
from tests.bench.decision_rows import MODELS
from tests.bench.decision_task import heldout_events, plant_events, trained_decisions
from tests.bench.dictated import DictatedEngine, key_of

PAGE = ROOT / "docs" / "why-it-is-fast.md"
DEADLINE_S = 600.0
BACKLOG = 8
HISTORY = 128
Stream = Sequence[Event]
Answer = Callable[[Stream], None]
Decisions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Form:
    """A row of the table.

    Args:
        name: what it adds to the row above.
        answer: decides events.
        at_once: how many events it is given at a time.
        learns: whether it does better with what it has seen.
    """

    name: str
    answer: Answer
    at_once: int = 1
    learns: bool = False


class OneByOne:
    """A cache that takes an answer's tokens one a pass, as plain generation does.

    Args:
        cache: holds the prefix.
        prompt_tokens: of the event, which is read in one pass.
    """

    def __init__(self, cache: KvCache, prompt_tokens: int) -> None:
        self._cache = cache
        self._whole = prompt_tokens

    def forward(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Scores after the last of ``tokens``, float32 (rows,)."""
        first, self._whole = self._whole, 0
        parts = [tokens[:first], *([token] for token in tokens[first:])] if first else [[token] for token in tokens]
        for part in parts[:-1]:
            self._cache.append(part)
        return self._cache.forward(parts[-1])


def forms(four: VerifiedBundle, eight: VerifiedBundle, threads: int, decisions: Decisions | None) -> list[Form]:
    """The rows, from no lever to all of them.

    Args:
        four, eight: the bundle in four and in eight bits.
        threads: intra-op threads.
        decisions: what is to be answered; None: what the model says.
    """
    task = four.manifest.tasks[0]

    def engine_of(bundle: VerifiedBundle, speed: Speed) -> Engine | DictatedEngine:
        if decisions is None:
            return Engine(bundle, threads, speed)
        return DictatedEngine(bundle, threads, speed, decisions)

    def one_by_one(engine: Engine, *, keeps_prefix: bool) -> Answer:
        prepared, prefix = engine.prepared(task), engine.encode_prefix(task)

        def answer(events: Stream) -> None:
            cache = prepared.cache
            assert isinstance(cache, KvCache)
            for event in events:
                cache.rewind(len(prefix) if keeps_prefix else 0)
                if not keeps_prefix:
                    cache.forward(prefix)
                ids = engine.encode_event(task, event)
                decode(OneByOne(cache, len(ids)), prepared.task.plan, ids, {}, time.monotonic() + DEADLINE_S)

        return answer

    def fully(engine: Engine | DictatedEngine) -> Answer:
        def answer(events: Stream) -> None:
            for found in engine.decide_many(task, events, deadline_s=DEADLINE_S):
                if isinstance(found, EdgeError):
                    raise found

        return answer

    events = Speed(drafts=False, alternatives=False, together=1)
    ways = Speed(drafts=False, together=1)
    everything = Speed(together=1)
    on_large_pages = [engine_of(eight, speed) for speed in (PLAIN, events, ways, everything, Speed())]
    gather_heap()  # what is loaded from here on lies on small pages
    plain = Engine(four, threads, PLAIN)
    return [
        Form("the whole prompt each time, a token a pass", one_by_one(plain, keeps_prefix=False)),
        Form("+ the prefix is kept", one_by_one(plain, keeps_prefix=True)),
        Form("+ forced tokens ride along", fully(engine_of(four, PLAIN))),
        Form("+ eight bits by rows", fully(engine_of(eight, PLAIN))),
        Form("+ the weights lie on large pages", fully(on_large_pages[0])),
        Form("+ what events begin with is kept", fully(on_large_pages[1]), learns=True),
        Form("+ both ways of a yes or no are tried at once", fully(on_large_pages[2]), learns=True),
        Form("+ probable answers are checked in one pass", fully(on_large_pages[3]), learns=True),
        Form("+ waiting events share passes", fully(on_large_pages[4]), BACKLOG, learns=True),
    ]


def measure(rows: Sequence[Form], events: Stream) -> list[list[float]]:
    """Time of a decision, ms, of each form for each group of `BACKLOG` events; history and first group do not count."""
    taken_ms: list[list[float]] = [[] for _ in rows]
    for form in rows:
        if form.learns:
            form.answer(events[:HISTORY])
    events = events[HISTORY:]
    for first in range(0, len(events), BACKLOG):
        group = events[first : first + BACKLOG]
        for row, form in zip(taken_ms, rows, strict=True):
            began_s = time.perf_counter()
            for at in range(0, len(group), form.at_once):
                form.answer(group[at : at + form.at_once])
            if first:
                row.append((time.perf_counter() - began_s) * 1000 / len(group))
    return taken_ms


def table(rows: Sequence[Form], taken_ms: Sequence[Sequence[float]]) -> list[str]:
    """As Markdown: time, what the row's lever gained, and what all so far gained."""
    lines = ["| | a decision | this lever | all so far |", "|---|---|---|---|"]
    before: Sequence[float] | None = None
    for form, taken in zip(rows, taken_ms, strict=True):
        gained = median(b / a for a, b in zip(taken, before or taken, strict=True))
        total = median(b / a for a, b in zip(taken, taken_ms[0], strict=True))
        lines.append(f"| {form.name} | {median(taken):.1f} ms | {gained:.2f}x | {total:.2f}x |")
        before = taken
    return lines


def streams(count: int) -> dict[str, Stream]:
    """Held-out events, and a plant's."""
    return {"held-out events": heldout_events(count), "a plant's events": plant_events(count)}


def opened(bundle: OurBundle | Missing) -> VerifiedBundle:
    """The bundle, verified.

    Raises:
        SystemExit: it could not be made.
    """
    if isinstance(bundle, Missing):
        raise SystemExit(bundle.why)
    return bundle.verified()


def rewrite(page: Path, mark: str, lines: Sequence[str]) -> None:
    """Put lines between ``<!-- measured: mark -->`` and ``<!-- end -->``."""
    before, _, rest = page.read_text("utf-8").partition(f"<!-- measured: {mark} -->\n")
    _, _, after = rest.partition("<!-- end -->")
    page.write_text("\n".join([f"{before}<!-- measured: {mark} -->", *lines, f"<!-- end -->{after}"]), "utf-8")


def main() -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.levers", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--events", type=int, default=72)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/why-it-is-fast.md")
    options = parser.parse_args()
    keep_on_heap()  # as a worker does, or only some of the weights would be gathered
    _, _, four, eight = make_own_bundles(options.model, MODELS[options.model], print)
    for name, events in streams(HISTORY + options.events).items():
        decisions = None
        if MODELS[options.model] is not None:
            answers = zip(events, trained_decisions(events), strict=True)
            decisions = {key_of(event): decision for event, decision in answers}
        rows = forms(opened(four), opened(eight), options.threads, decisions)
        lines = table(rows, measure(rows, events))
        print("\n".join([name, *lines]))
        if options.write:
            rewrite(PAGE, f"{options.model}, {name}", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
