"""``decide``, ``bench`` and ``dead-letters``: the commands that need no running daemon."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.contract.event import Event, check_event, event_id, parse_event, printable
from edge_agent.errors import EdgeError, RefusedError, from_os_error

if TYPE_CHECKING:
    from edge_agent.runtime.engine import Engine

MAX_LINE_BYTES = 1 << 20
BENCH_S = 10.0


def decide(options: argparse.Namespace) -> int:
    """Decide one event given as an argument, or one a line from stdin.

    Returns:
        0 when every event was decided, else 1; on stdin a line that cannot be decided yields ``{"error": …}`` in its
        place, so that input and output lines correspond.
    """
    engine = _open_engine(options, goes_on=options.event == "-")
    task = _task_of(engine, options.task)
    if options.event != "-":
        print(json.dumps(_decide_one(engine, task, options.event, options.deadline_s), ensure_ascii=False))
        return 0
    failed = 0
    # A caller may close stdin; then there is no event.
    for line in _lines(sys.stdin.buffer) if sys.stdin is not None else ():
        try:
            answer = _decide_one(engine, task, line, options.deadline_s)
        except EdgeError as error:
            answer, failed = {"error": error.as_dict()}, failed + 1
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    return 1 if failed else 0


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a bundle on this machine: the figures of ``edge-agent bench``."""
    from edge_agent.runtime.bench import bench as measure

    started_s = time.monotonic()
    engine = _open_engine(options, goes_on=True)
    load_s = time.monotonic() - started_s
    task = _task_of(engine, options.task)
    if options.events:
        events = _events_of_file(options.events)
    else:
        events = [dict(example.event) for example in engine.golden(task)]
    if not events:
        raise RefusedError("bench.no_events", "no events to measure with: give --events FILE")
    return {**measure(engine, task, events, seconds=options.seconds or BENCH_S), "load_s": round(load_s, 3)}


def sweep_threads(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a bundle with every count of threads, as an installation does: ``edge-agent bench --sweep-threads``.

    Returns:
        ``threads``: what an installation would take, None where the time was too short for every count;
        ``default_threads``: what is taken without a sweep; ``table``: ``threads``, ``p50_ms``, ``p95_ms`` and
        ``decisions`` of every count; ``machine`` and ``runtime``, which a choice holds for.
    """
    from edge_agent.contract.task import load_task
    from edge_agent.runtime.session import resolve_threads
    from edge_agent.runtime.signed_bundle import load_trusted_keys, open_signed_bundle
    from edge_agent.runtime.thread_choice import runtime_version, this_machine
    from edge_agent.runtime.thread_sweep import Job, choose_threads, counts_for, golden_jobs, sweep, usable_cores
    from edge_agent.runtime.worker_process import WorkerProcess
    from edge_agent.settings import WorkerSettings

    bundle = open_signed_bundle(options.bundle, load_trusted_keys(options.trusted_key))
    task = _one_task(bundle.manifest.tasks, options.task)
    if options.events:
        deadline_s = load_task(bundle.path / "tasks" / task / "task.yaml").deadline_ms / 1000
        jobs = [Job(task, event, deadline_s) for event in _events_of_file(options.events)]
    else:
        jobs = [job for job in golden_jobs(bundle.path) if job.task == task]
    if not jobs:
        raise RefusedError("bench.no_events", "no events to measure with: give --events FILE")

    def worker_with(count: int, left_s: float) -> WorkerProcess:
        return WorkerProcess(bundle.path, bundle.digest, WorkerSettings(threads=count, start_timeout_s=left_s))

    budget_s = options.seconds or WorkerSettings().thread_sweep_s
    table = sweep(worker_with, jobs, counts_for(usable_cores()), budget_s)
    return {
        "threads": choose_threads(table),
        "default_threads": resolve_threads(0),
        "table": [
            {
                "threads": measured.threads,
                "p50_ms": round(measured.p50_ms, 3),
                "p95_ms": round(measured.p95_ms, 3),
                "decisions": measured.decisions,
            }
            for measured in table
            if measured.visits_ms
        ],
        "machine": this_machine(),
        "runtime": runtime_version(),
    }


def dead_letters(options: argparse.Namespace, rest: list[str]) -> int:
    """List dead letters, or put one back into the inbox."""
    from edge_agent.settings import load_settings
    from edge_agent.uplink.spool import Spool

    settings = load_settings(options.config, rest)
    path = settings.state_dir / "spool.sqlite"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RefusedError(
            "deadletter.no_spool", f"no spool at {path}: has the agent run with this state_dir?"
        ) from error
    except OSError as error:
        raise from_os_error(error, f"opening {path}") from error
    spool = Spool(path, settings.spool, is_owner=False)
    try:
        if options.action == "retry":
            if options.id is None:
                raise RefusedError("deadletter.unknown", "retry needs the id of a dead letter (see: dead-letters list)")
            print(f"dead letter {options.id}: {spool.requeue(options.id).value}")
            return 0
        letters = spool.dead_letters(options.limit)
    finally:
        spool.close()
    for letter in letters:
        if options.json:
            content = letter.payload.decode("utf-8", "replace") if letter.payload is not None else None
            row = {"id": letter.dead_letter_id, "event_id": letter.event_id, "task": letter.task, "code": letter.code}
            print(json.dumps({**row, "detail": letter.detail, "received_ms": letter.received_ms, "payload": content}))
        else:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.received_ms / 1000))
            # Task and detail are the sender's words.
            task, detail = printable(letter.task or "-"), printable(letter.detail)
            print(f"{letter.dead_letter_id:>6}  {when}  {letter.code:<22}  {task:<12}  {detail}")
    if not letters and not options.json:
        print("no dead letters")
    return 0


def _open_engine(options: argparse.Namespace, *, goes_on: bool) -> Engine:
    from edge_agent.runtime.engine import Engine
    from edge_agent.runtime.signed_bundle import load_trusted_keys, open_signed_bundle
    from edge_agent.runtime.speed import Speed

    trusted = load_trusted_keys(options.trusted_key)
    return Engine(open_signed_bundle(options.bundle, trusted), options.threads, Speed(large_pages=goes_on))


def _task_of(engine: Engine, wanted: str | None) -> str:
    return _one_task(tuple(engine.tasks), wanted)


def _one_task(tasks: tuple[str, ...], wanted: str | None) -> str:
    if wanted is not None and wanted not in tasks:
        raise RefusedError("task.unknown", f"no task {wanted!r} in this bundle; it has: {', '.join(tasks)}")
    if wanted is None and len(tasks) != 1:
        raise RefusedError("task.ambiguous", f"--task is needed: this bundle has {', '.join(tasks)}")
    return wanted or tasks[0]


def _decide_one(engine: Engine, task: str, raw: bytes | str, deadline_s: float | None) -> dict[str, Any]:
    from edge_agent.answering import decision_of
    from edge_agent.contract.messages import model_ref

    spec = engine.tasks[task]
    event = parse_event(raw, max_bytes=spec.limits.max_event_bytes)
    answer = engine.decide(task, event, deadline_s=deadline_s or spec.deadline_ms / 1000)
    model = model_ref(engine.bundle.manifest, engine.bundle.digest)
    return decision_of(answer, task, event_id(event), model).model_dump(mode="json")


def _events_of_file(path: Path) -> list[Event]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    return [_event_of_line(line, f"line {n} of {path.name}") for n, line in enumerate(lines, 1) if line.strip()]


def _event_of_line(line: bytes, where: str) -> Event:
    """An event, or the event of a labelled row ``{"event": …, "decision": …}``."""
    try:
        parsed = json.loads(line)
        return check_event(parsed.get("event", parsed) if isinstance(parsed, dict) else parsed)
    except RefusedError as error:
        raise RefusedError(error.code, f"{where}: {error.detail}") from error
    except (ValueError, RecursionError) as error:
        raise RefusedError("event.not_json", f"{where}: not valid JSON: {error}") from error


def _lines(stream: Any) -> Iterator[bytes]:
    """Non-empty lines, none longer than `MAX_LINE_BYTES` in memory (the rest of a longer one is read and dropped)."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            _skip_rest(iter(lambda: stream.readline(MAX_LINE_BYTES), b""))
        if line.strip():
            yield line


def _skip_rest(pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        if piece.endswith(b"\n"):
            return
