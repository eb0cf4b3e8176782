"""What a pass of so many tokens, and a decision, takes in INT4 and in eight bits: the forms take turns, in one process.

    python -m tests.bench.pass_lengths --shape smollm2-135m
    python -m tests.bench.pass_lengths --processor-time --write    # one thread's own time: neighbours disturb it less

A decision is made of few passes of few tokens: the event's (some dozens) and those after its choices (a handful).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from edge_agent.contract.manifest import read_manifest
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from tests.bench.graph_options import FORMS, bundles_of, write_table
from tests.bench.graph_passes import DEADLINE_S, HELDOUT, TASK, Passes

PAST_TOKENS = 250
COUNTS = (1, 7, 28, 45, 70, 120)
NAMES = {
    FORMS[1].name: "INT4",
    "+ projections in eight bits, by rows": "eight bits, by rows",
    "+ projections in eight bits, by blocks of 32": "eight bits, by blocks",
}
"""Forms that are compared, the first the yardstick, and what the table calls them."""


def work_of(bundle: Path, threads: int) -> dict[str, Callable[[int], object]]:
    """What is timed of a form.

    Args:
        bundle: its folder.
        threads: intra-op threads.

    Returns:
        what -> a call that is told the number of the turn.
    """
    passes = Passes(bundle, threads, capacity_tokens=PAST_TOKENS + max(COUNTS))
    passes.run(0, PAST_TOKENS)
    engine = Engine(open_installed_bundle(bundle, read_manifest(bundle)[1]), threads)
    events = [json.loads(line)["event"] for line in HELDOUT.read_text("utf-8").splitlines()]

    def a_pass(count: int) -> Callable[[int], object]:
        return lambda _: passes.run(PAST_TOKENS, count)

    work = {f"{count} token{'s' * (count > 1)}": a_pass(count) for count in COUNTS}
    work["a decision"] = lambda turn: engine.decide(TASK, events[turn % len(events)], deadline_s=DEADLINE_S)
    return work


def take_turns(
    bundles: Mapping[str, Path], rounds: int, threads: int, clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Do everything with every form once a round.

    Args:
        bundles: by name of the form.
        rounds: how often.
        threads: intra-op threads.
        clock: seconds.

    Returns:
        name of the form -> what -> milliseconds of each round.
    """
    forms = {name: work_of(bundle, threads) for name, bundle in bundles.items()}
    found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in work} for name, work in forms.items()}
    for turn in range(rounds):
        for what in found[next(iter(forms))]:
            for name, work in forms.items():
                work[what](turn)  # its weights were pushed out of the caches by the others'
                started_s = clock()
                work[what](turn + 1)
                found[name][what].append((clock() - started_s) * 1000)
    return found


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Least and median milliseconds, and how many times faster than INT4 (median of the rounds' ratios)."""
    yardstick = found[next(iter(NAMES))]
    head = ["", *(cell for name in NAMES.values() for cell in (f"{name}: least", "median", ""))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for what in yardstick:
        cells = [what]
        for name in NAMES:
            mine = found[name][what]
            ratio = median(theirs / own for own, theirs in zip(mine, yardstick[what], strict=True))
            cells += [f"{min(mine):.1f} ms", f"{median(mine):.1f} ms", f"{ratio:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pass_lengths")
    parser.add_argument("--shape", default="smollm2-135m", help="a published shape, or `reference`")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of time that passed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/graph.md")
    arguments = parser.parse_args(argv)
    alone = arguments.processor_time
    if arguments.write and not alone:
        parser.error("docs/graph.md holds the table of --processor-time")
    bundles = bundles_of(arguments.shape, 1024, [form for form in FORMS if form.name in NAMES])
    found = take_turns(
        bundles, arguments.rounds, 1 if alone else arguments.threads, time.thread_time if alone else time.perf_counter
    )
    text = table(found)
    print(text)
    if arguments.write:
        write_table(f"passes, processor time, {arguments.shape}", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
