"""Ends a pass that outlives its event's deadline, in place: the process, its model and its cached prefixes stay.

Python cannot interrupt native code, but ONNX Runtime looks at a flag before every node of the graph. A thread of its
own sets it. What is one node to the graph (a large matrix product, a compiled engine) still runs to its end: there
the agent's grace period is the limit, and the process ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort


class PassLimit:
    """One deadline at a time, for the passes of one session.

    The thread begins with the first deadline and ends at a deadline that nobody waits for any more. So steady work pays
    for no wakeup, and an idle process has no thread that could.

    Attributes:
        run_options: to be given to every pass.
        wakes_at_s: when the thread looks up next; None while there is none.
    """

    def __init__(self) -> None:
        self.run_options = ort.RunOptions()
        # "No graph capture", which is also the default; asked for an entry that is absent, the library's Python side
        # raises and catches an exception with every pass (35 us).
        self.run_options.add_run_config_entry("gpu_graph_id", "-1")
        self._changed = threading.Condition()
        self._deadline_at_s: float | None = None
        self.wakes_at_s: float | None = None

    @contextlib.contextmanager
    def until(self, deadline_at_s: float) -> Iterator[None]:
        """Within, passes fail as soon as ``deadline_at_s`` is over.

        Args:
            deadline_at_s: on `time.monotonic`.
        """
        with self._changed:
            self._deadline_at_s = deadline_at_s
            if self.wakes_at_s is None:
                # No memory for a thread's stack: the agent's grace period is left.
                with contextlib.suppress(RuntimeError):
                    threading.Thread(target=self._watch, name="pass-limit", daemon=True).start()
                    self.wakes_at_s = deadline_at_s
            elif deadline_at_s < self.wakes_at_s:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._deadline_at_s = None
                # Under the same lock as its setting: the next event never inherits this one's end.
                self.run_options.terminate = False

    def _watch(self) -> None:
        with self._changed:
            while self._deadline_at_s is not None:
                left_s = self._deadline_at_s - time.monotonic()
                if left_s <= 0:
                    self.run_options.terminate = True
                    break
                self.wakes_at_s = self._deadline_at_s
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            self.wakes_at_s = None
