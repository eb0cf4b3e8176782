"""Speed changes no answer: the engine with every lever against plain decoding, one token and one pass at a time.

    python -m tests.bench.equality                              # 10,000 generated events, the reference bundle
    python -m tests.bench.equality --events 500 --bundle DIR    # any bundle of the reference task

Events come in batches, every tenth one twice, so that caches, drafts and shared passes are all at work. Where a
decision differs, the plain decoder's scores say whether it was a tie: the two likeliest tokens less than 0.001 apart,
which other kernels for another number of tokens may round either way. Ties are listed. Exits 1 where anything else
differs, or ties are more than 0.1 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import EdgeError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.speed import Speed
from export.proof.greedy import Decoded, GreedyDecoder
from export.reference.generator import generate

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "export" / "reference" / "bundle"
TIE = 1e-3
TIES_MAX = 1e-3
BATCH = 8
REPEAT_EVERY = 10
FASTEST = Speed(decision_cache_bytes=8 << 20)


@dataclass(frozen=True)
class Difference:
    """An event that was answered otherwise.

    Args:
        event: the event.
        field: the first field that differs, in the order in which fields are decided.
        plain: its value by plain decoding.
        fast: its value by the engine.
        margin: between the two likeliest tokens at the closest choice of that field.
    """

    event: Event
    field: str
    plain: Any
    fast: Any
    margin: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding excuses it."""
        return self.margin < TIE

    def __str__(self) -> str:
        kind = "tie" if self.is_tie else "DIFFERENT"
        event = json.dumps(self.event, ensure_ascii=False)
        return f"{kind}: {self.field} is {self.plain!r}, not {self.fast!r}, by {self.margin:.6f}: {event}"


def compare(bundle: Path, events: Sequence[Event], threads: int = 1, speed: Speed = FASTEST) -> list[Difference]:
    """Decide events both ways.

    Args:
        bundle: a verified bundle of one task.
        events: every one of them is decided by both.
        threads: of the engine.
        speed: levers of the engine.

    Raises:
        EdgeError: what only one of the two refuses.
    """
    manifest, digest = read_manifest(bundle)
    engine = Engine(open_installed_bundle(bundle, digest), threads, speed)
    (name,) = manifest.tasks
    task = engine.tasks[name]
    plainly = GreedyDecoder(bundle / manifest.model.decoder, bundle / manifest.model.tokenizer, manifest.model)
    found = []
    for first in range(0, len(events), BATCH):
        batch = events[first : first + BATCH]
        for event, fast in zip(batch, engine.decide_many(name, batch, deadline_s=600.0), strict=True):
            if isinstance(fast, EdgeError):
                raise fast
            slow = plainly.decide(task, event)
            guarded, _ = task.apply_guards(event, slow.decision)
            if fast.decision != guarded:
                found.append(_difference(event, slow, guarded, fast.decision))
    return found


def _difference(event: Event, slow: Decoded, plain: dict[str, Any], fast: dict[str, Any]) -> Difference:
    field = next(name for name in plain if plain[name] != fast[name])
    margins = [float(np.diff(np.sort(c.logits)[-2:])[0]) for c in slow.choices if c.field == field]
    return Difference(event, field, plain[field], fast[field], min(margins, default=float("inf")))


def repeated(events: Iterator[Event]) -> Iterator[Event]:
    """Every tenth event twice."""
    for number, event in enumerate(events):
        yield event
        if number % REPEAT_EVERY == 0:
            yield event


def main() -> int:
    """Compare in as many processes as there are cores; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.equality", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--bundle", type=Path, default=REFERENCE)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    stream = repeated(dict(labelled.event) for labelled in generate("test", options.seed))
    events = list(itertools.islice(stream, options.events))
    cores = multiprocessing.cpu_count()
    share = -(-len(events) // (4 * cores))
    parts = [(options.bundle.resolve(), events[at : at + share]) for at in range(0, len(events), share)]
    differences: list[Difference] = []
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        for done, found in enumerate(pool.starmap(compare, parts), start=1):
            differences += found
            print(f"{min(len(events), done * share)} events compared", file=sys.stderr)
    for difference in differences:
        print(difference)
    ties = sum(difference.is_tie for difference in differences)
    others = len(differences) - ties
    share_of_ties = f"{ties / len(events):.3%}; at most {TIES_MAX:.1%}"
    print(f"{len(events)} events: {others} answered otherwise, {ties} ties ({share_of_ties})")
    return 1 if others or ties > TIES_MAX * len(events) else 0


if __name__ == "__main__":
    raise SystemExit(main())
