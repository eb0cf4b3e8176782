"""A worker whose engine does what the event says: hang, crash, eat memory, talk nonsense.

Run as ``python -m tests.fakes.misbehaving_worker`` in place of the real worker, around the real serving loop.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from edge_agent.contract.event import Event
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError
from edge_agent.runtime.answer import Answer, GoldenOutcome, WorkerFacts
from edge_agent.runtime.memory import rss_bytes
from edge_agent.runtime.speed import Speed
from edge_agent.runtime.worker import Progress, main

_BLOCK_BYTES = 1 << 20
_LEAK_BYTES = 16 << 20
_FAULTS = {
    "refuse": RefusedError("event.too_long", "as the test asked", tokens=12),
    "no_number": PermanentError("worker.bad_logits", "as the test asked"),
    "refused_pass": PermanentError("worker.inference", "as the test asked"),
}
_NONSENSE = {
    "garbage": b"\xff\xff\xff\xff garbage",
    "not_json": b"\x00\x00\x00\x04\xff\xfe\x00{",
    "stale": b'\x00\x00\x00\x17{"answer": {}, "id": 0}',
}


class Misbehaving:
    def __init__(self, bundle: Path, digest: str, threads: int, speed: Speed) -> None:
        self._leaked: list[bytes] = []
        self._fd = int(sys.argv[sys.argv.index("--fd") + 1])
        match bundle.name:
            case "refuses-to-load":
                raise IntegrityError("bundle.file_corrupt", "as the test asked", path="model/decoder.onnx")
            case "dies-at-load":
                print("last words at load", flush=True)
                os._exit(7)
            case "hangs-at-load":
                threading.Event().wait()

    def facts(self) -> WorkerFacts:
        return WorkerFacts(0.0, rss_bytes() or 0, ("FakeProvider",), ("task",), {"task": 1}, 1)

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        print(f"asked to {event.get('act')}", flush=True)
        match event.get("act"):
            case "hang":
                print("hanging", flush=True)
                threading.Event().wait()
            case "hoard":
                blocks = []
                while True:
                    blocks.append(bytes(_BLOCK_BYTES))
            case "leak":
                self._leaked.append(b"x" * _LEAK_BYTES)
            case "abort" | "exit" as end:
                os.abort() if end == "abort" else os._exit(9)
            case "raise":
                raise ZeroDivisionError("a defect")
            case "refuse" | "no_number" | "refused_pass" as fault:
                raise _FAULTS[fault]
            case "garbage" | "not_json" | "stale" as nonsense:
                os.write(self._fd, _NONSENSE[nonsense])
            case "torn":
                os.write(self._fd, b"\x00\x00\x10\x00{")
                os._exit(0)
            case "shout":
                sys.stderr.write("x" * 300_000 + "\n")
                sys.stderr.write("\n".join(f"line {n}" for n in range(5000)) + "\nthe end\n")
                sys.stderr.flush()
        return Answer({"task": task}, {}, "device", (), (), truncated=False, passes=1, tokens_out=1, latency_ms=0.1)

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        return [self.decide(task, event, deadline_s) for event in events]

    def golden_step_s(self) -> float:
        return 0.2

    def run_golden(self, progress: Progress) -> GoldenOutcome:
        progress(1, 2)
        threading.Event().wait()
        raise AssertionError


if __name__ == "__main__":
    sys.exit(main(factory=Misbehaving))
