"""The worker process: one engine behind a socket. Started by `worker_process.WorkerProcess`, never by hand.

A crash, a leak or an exhausted memory limit ends here and leaves the agent alive. The process answers one request at
a time, ends when its socket closes, and is killed by the kernel when the agent dies.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

# Before pydantic is imported: it would look through every installed package for plugins, and run those it finds.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# Before numpy is imported: it would start threads for matrix products that nobody here asks it for.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from edge_agent.contract.event import Event, check_event
from edge_agent.errors import EdgeError, PermanentError, TransientError
from edge_agent.runtime.frames import LAST_FAULTS, FrameChannel, Message, error_message
from edge_agent.runtime.head_start import HeadStart
from edge_agent.runtime.large_pages import keep_on_heap
from edge_agent.runtime.memory import limit_growth, physical_bytes, volunteer_for_oom_kill
from edge_agent.runtime.speed import Speed

if TYPE_CHECKING:  # what takes long to import is imported while the bundle is hashed
    from edge_agent.runtime.answer import Answer, GoldenOutcome, WorkerFacts
    from edge_agent.runtime.engine import Engine

EXIT_LOAD_FAILED = 3
EXIT_OUT_OF_MEMORY = 4
EXIT_PROTOCOL = 5
EXIT_DISTRUSTED = 6
OOM_SCORE_EXTRA = 300
_PR_SET_PDEATHSIG = 1
_MEMORY_RESERVE_BYTES = 4 << 20

Progress = Callable[[int, int], None]


class Decider(Protocol):
    """What the worker serves; the real one is `EngineDecider`."""

    def facts(self) -> WorkerFacts:
        """What was loaded."""

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        """Decide one event."""

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        """Decide events that wait; each has its answer or its own fault."""

    def golden_step_s(self) -> float:
        """Longest time that one golden example may take, in seconds."""

    def run_golden(self, progress: Progress) -> GoldenOutcome:
        """Answer all golden examples."""


DeciderFactory = Callable[[Path, str, int, Speed], Decider]


def load_engine(bundle: Path, digest: str, threads: int, speed: Speed) -> Engine:
    """Load an installed bundle, all of it hashed first.

    Args:
        bundle: its directory.
        digest: the digest that was verified when it was installed.
        threads: intra-op threads, 0 = choose.
        speed: what is done to be fast.

    Raises:
        EdgeError: as `open_installed_bundle` and `Engine`.
    """
    if speed.large_pages:
        keep_on_heap()
    with _impatient_threads():
        # Hashing does not hold up the interpreter, which imports the libraries meanwhile.
        with HeadStart(bundle, digest) as hashing:
            from edge_agent.runtime.bundle import open_installed_bundle
            from edge_agent.runtime.loading import load_model
            from edge_agent.runtime.prefix_store import PrefixStore
            from edge_agent.runtime.providers import CPU, PROVIDERS
            from edge_agent.runtime.session import resolve_threads

            verified = open_installed_bundle(bundle, digest, hashing.hashes())
        if PROVIDERS[verified.manifest.target] == CPU:
            # What this machine cannot hold fails here, by name, before it drives the rest out of memory. Accelerators
            # reserve far more addresses than they use.
            limit_growth(physical_bytes())
        threads = resolve_threads(threads)
        prefixes = PrefixStore(speed.prefix_dir)
        loaded = load_model(verified, threads, prefixes, lambda: importlib.import_module("edge_agent.runtime.engine"))
        from edge_agent.runtime.engine import Engine

        engine = Engine(verified, threads, speed, loaded)
    # What is loaded stays. Looked through for garbage in cycles it would take 20 ms of one event in hundreds.
    gc.freeze()
    return engine


@contextlib.contextmanager
def _impatient_threads() -> Iterator[None]:
    """Let a thread that comes back from a library wait for the interpreter a tenth as long as it would."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(before_s / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


class EngineDecider:
    """The engine on an installed bundle.

    Args:
        bundle: its directory.
        digest: the digest that was verified when it was installed.
        threads: intra-op threads, 0 = choose.
        speed: what is done to be fast.
    """

    def __init__(self, bundle: Path, digest: str, threads: int, speed: Speed) -> None:
        self._engine = load_engine(bundle, digest, threads, speed)

    def facts(self) -> WorkerFacts:
        """What was loaded."""
        return self._engine.facts()

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        """Decide one event."""
        return self._engine.decide(task, event, deadline_s=deadline_s)

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        """Decide events that wait."""
        return self._engine.decide_many(task, events, deadline_s=deadline_s)

    def golden_step_s(self) -> float:
        """The longest deadline of the bundle's tasks."""
        return max(task.deadline_ms for task in self._engine.tasks.values()) / 1000

    def run_golden(self, progress: Progress) -> GoldenOutcome:
        """Answer all golden examples."""
        from edge_agent.runtime.golden import run_golden

        return run_golden(self._engine, progress)


def main(argv: Sequence[str] | None = None, factory: DeciderFactory = EngineDecider) -> int:
    """Load and serve until the socket closes; returns the exit status."""
    options = _parse(argv)
    _tie_to_parent(options.parent)
    volunteer_for_oom_kill(OOM_SCORE_EXTRA)
    # Where a sandbox forbids it, the work is done at the service's own priority.
    with contextlib.suppress(OSError):
        os.nice(options.niceness)
    # The agent decides when to end: a Ctrl-C or a stop of the whole service must not cut an answer short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = FrameChannel(socket.socket(fileno=options.fd))
    try:
        speed = Speed(
            prefix_dir=options.prefix_dir,
            event_cache_bytes=options.event_cache,
            decision_cache_bytes=options.decision_cache,
            together=options.together,
            large_pages=True,
        )
        decider = factory(options.bundle, options.digest, options.threads, speed)
        channel.send({"ready": decider.facts().as_dict()})
    except EdgeError as error:
        channel.send({"error": error_message(error)})
        return EXIT_LOAD_FAILED
    except MemoryError:
        channel.send({"error": error_message(PermanentError("worker.out_of_memory", "no memory to load the bundle"))})
        return EXIT_OUT_OF_MEMORY
    limit_growth(options.memory_limit)
    return _serve(channel, decider)


def _serve(channel: FrameChannel, decider: Decider) -> int:
    # Given back when memory runs out, so that there is room to say so. What is limited are addresses, so no page of it
    # has to be there.
    reserve = mmap.mmap(-1, _MEMORY_RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    while True:
        try:
            request = channel.receive()
        except EdgeError as error:
            _log(str(error))
            return EXIT_PROTOCOL
        if request is None or request.get("op") == "stop":
            return 0
        status: int | None = None
        try:
            reply = _answer(channel, decider, request)
        except MemoryError:
            reserve.close()
            status = EXIT_OUT_OF_MEMORY
            reply = _last_words("worker.out_of_memory", "allocation failed while deciding")
        except EdgeError as error:
            if error.code not in LAST_FAULTS:
                reply = {"error": error_message(error)}
            else:
                reserve.close()
                status = EXIT_OUT_OF_MEMORY if error.code == "worker.out_of_memory" else EXIT_DISTRUSTED
                reply = _last_words(error.code, error.detail)
        except Exception as error:  # noqa: BLE001 - a defect must cost one event, not the process
            _log(traceback.format_exc())
            reply = {"error": error_message(PermanentError("worker.internal", repr(error)[:500]))}
        channel.send({**reply, "id": request.get("id")})
        if status is not None:
            return status


def _answer(channel: FrameChannel, decider: Decider, request: Message) -> Message:
    match request.get("op"):
        case "decide":
            event = check_event(request["event"])
            return {"answer": decider.decide(request["task"], event, float(request["deadline_s"])).as_dict()}
        case "decide_many":
            events = [check_event(event) for event in request["events"]]
            found = decider.decide_many(request["task"], events, float(request["deadline_s"]))
            if fault := next((one for one in found if isinstance(one, EdgeError) and one.code in LAST_FAULTS), None):
                # This process is not to be trusted any more, and so are the answers that it gave in the same passes.
                raise fault
            return {"answers": [_told(one) for one in found]}
        case "golden":
            step_s = decider.golden_step_s()

            def progress(done: int, total: int) -> None:
                channel.send({"progress": [done, total], "step_s": step_s, "id": request.get("id")})

            progress(0, 0)
            return {"golden": decider.run_golden(progress).as_dict()}
        case other:
            raise PermanentError("worker.protocol", f"unknown request {other!r}")


def _told(answer: Answer | EdgeError) -> Message:
    return {"error": error_message(answer)} if isinstance(answer, EdgeError) else {"answer": answer.as_dict()}


def _last_words(code: str, detail: str) -> Message:
    # Transient: the next process starts with all of its memory, and with weights and prefixes from verified files. The
    # agent bounds how often one event may try.
    return {"error": error_message(TransientError(code, detail))}


def _tie_to_parent(parent_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above took effect
        os._exit(0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edge_agent.runtime.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--digest", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory-limit", type=int, required=True)
    parser.add_argument("--niceness", type=int, required=True)
    parser.add_argument("--prefix-dir", type=Path)
    parser.add_argument("--event-cache", type=int, required=True)
    parser.add_argument("--decision-cache", type=int, required=True)
    parser.add_argument("--together", type=int, required=True)
    return parser.parse_args(argv)


def _log(text: str) -> None:
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
