"""The demo's plot: a plant's day with a flood and an outage, and four releases of which two must not stay."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.demo.bundles import find_reference
from deploy.demo.consumer import History
from deploy.demo.plant import QUIET, Pace
from deploy.demo.result import Result, UpdateOutcome, outcome_of
from deploy.demo.screen import Scene, Screen, closing_table, make_screen
from deploy.demo.stage import Release, Stage, built
from edge_agent.contract.messages import UpdateState
from edge_agent.errors import EdgeError
from edge_agent.fs import write_atomic

_TICK_S = 0.1
# How long a phase may outlast its share of the day while it waits for the node (a busy machine is no fault).
_PATIENCE_S = 30.0
_ENDS: frozenset[UpdateState] = frozenset({"committed", "rolled_back", "failed"})
_STEADY = Pace("steady", per_s=8.0)
_TRICKLE = Pace("flood", per_s=15.0)
_LOAD = Pace("load", per_s=25.0)
_FLOOD_PER_S = 400.0
_LEAST_BACKLOG, _MOST_BACKLOG = 120, 600
# Not a drop: the broker sent an event again after the cut, and the node knew it.
_RECOGNISED = "event.duplicate"


@dataclass(frozen=True)
class DemoOptions:
    """What `edge-deploy demo` was told.

    Args:
        seconds: length of the plant's day; phases scale with it.
        json_path: where the result goes, or None.
        plain: no live panel.
        bundle: what the releases are made of; None is the reference bundle.
        broker: which broker to use.
        keep: leave the working directory behind.
    """

    seconds: float
    json_path: Path | None
    plain: bool
    bundle: Path | None
    broker: Literal["auto", "mosquitto", "amqtt"]
    keep: bool


def run_demo(options: DemoOptions) -> int:
    """Play the day; returns 0 when every promise was kept, else 1.

    Raises:
        KeyboardInterrupt: after everything was ended and removed.
    """
    directory = Path(tempfile.mkdtemp(prefix="edge-demo-"))
    screen = make_screen(plain=options.plain)
    result: Result | None = None
    try:
        with _terminated_like_interrupted():
            bundle = options.bundle or find_reference()
            screen.say(f"working directory {directory}, bundle {bundle}")
            with built(directory, bundle, options.broker) as stage:
                result = Day(stage, options.seconds, screen).play()
    except EdgeError as error:
        screen.close()
        sys.stderr.write(f"edge-deploy: {error}\n")
        _write_json(options, {"ok": False, "broken": [str(error)], "error": error.as_dict()})
    except KeyboardInterrupt:
        _remove(directory, keep=options.keep)
        raise
    finally:
        screen.close()
    if result is not None:
        closing_table(result)
        _write_json(options, result.as_dict())
        if not result.broken():
            _remove(directory, keep=options.keep)
            return 0
    _show_logs(directory)
    return 1


class Day:
    """One day of the plant.

    Args:
        stage: the running parts.
        seconds: planned length.
        screen: where to show it.
    """

    def __init__(self, stage: Stage, seconds: float, screen: Screen) -> None:
        self._stage = stage
        self._seconds = seconds
        self._screen = screen
        self._orders: list[tuple[Release, int]] = []
        self._phase = "start"
        self._notes: list[str] = []
        self._began_s = time.monotonic()
        self._planned_s = 0.0
        # Wall clock, because it is compared with the node's own timestamps.
        self._cut_ms = self._restored_ms = 0

    def play(self) -> Result:
        """From the first release to the last delivered decision."""
        stage = self._stage
        self._screen.say(f"broker {stage.broker.title}, registry with {len(stage.releases)} signed releases")
        v1, v2, v3, v4 = stage.releases
        self._wait("node online", self._online)
        self._began_s = time.monotonic()

        self._order(v1)
        # The first events come when there is somebody to answer; before that they would only wait.
        self._wait("v1 tried", lambda: self._state() in ("probation", *_ENDS))
        self._play("night", 0.12, _STEADY, self._update_ended)
        self._order(v2)
        self._play("morning", 0.14, _STEADY, self._update_ended)
        self._order(v3)
        self._play("noon", 0.12, _STEADY, self._update_ended)

        backlog = self._flood(outage_s=0.14 * self._seconds)
        self._play("flood", 0.08, Pace("flood", _FLOOD_PER_S, backlog), lambda: self._inbox() >= backlog * 0.7)
        self._cut()
        self._play("outage", 0.14, _TRICKLE, whole=True)
        self._restore()
        self._play("recovery", 0.12, _STEADY, lambda: self._online() and stage.ledger.outstanding() < _STEADY.per_s * 2)

        # It must not commit before the load that is its undoing.
        self._order(v4, probation_decisions=2000)
        self._play("evening", 0.06, _STEADY, lambda: self._state() in ("probation", *_ENDS))
        self._play("load", 0.12, _LOAD, self._update_ended)
        self._play("night", 0.06, _STEADY)
        self._finish()
        return self._result()

    def _order(self, release: Release, *, probation_decisions: int = 10) -> None:
        probation_s = max(0.5, self._seconds * 0.03)
        rev = self._stage.order(release, probation_decisions=probation_decisions, probation_s=probation_s)
        self._orders.append((release, rev))
        variant, published = release.variant, release.published
        self._screen.say(
            f"ordered {variant.label} ({variant.story}; {published.new_bytes:,} of {published.size_bytes:,} bytes new)"
        )

    def _flood(self, *, outage_s: float) -> int:
        """Measure how fast this machine decides under a flood.

        Returns:
            A backlog that lasts somewhat longer than the outage, so that the node has work throughout it and is not
            busy with it for the rest of the day.
        """
        ledger = self._stage.ledger
        before, started_s = ledger.totals().decisions_out, time.monotonic()
        self._play("flood", 0.04, Pace("flood", _FLOOD_PER_S, _LEAST_BACKLOG))
        per_s = (ledger.totals().decisions_out - before) / (time.monotonic() - started_s)
        return round(min(_MOST_BACKLOG, max(_LEAST_BACKLOG, 1.3 * per_s * outage_s)))

    def _play(
        self, phase: str, share: float, pace: Pace, done: Callable[[], bool] = lambda: True, *, whole: bool = False
    ) -> None:
        """Run a phase until its time on the day's clock and until ``done``.

        When the day is late, phases are cut short, down to a quarter, unless ``whole``.
        """
        self._phase = phase
        self._stage.plant.enter(pace)
        now_s, length_s = time.monotonic(), share * self._seconds
        self._planned_s += length_s
        ends_s = now_s + length_s if whole else max(now_s + length_s / 4, self._began_s + self._planned_s)
        while time.monotonic() < ends_s:
            self._tick()
        self._wait(f"end of the phase {phase}", done)

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not done():
            if time.monotonic() > deadline_s:
                self._notes.append(f"{what}: not within {_PATIENCE_S:g} s")
                return
            self._tick()

    def _tick(self) -> None:
        self._stage.check()
        self._screen.show(self._scene())
        time.sleep(_TICK_S)

    def _cut(self) -> None:
        self._stage.link.cut()
        # Taken once nothing passes any more: a decision stamped from here on cannot have been delivered yet.
        self._cut_ms = _now_ms()
        self._screen.say(f"link cut with {self._inbox()} events in the node's inbox")

    def _restore(self) -> None:
        self._restored_ms = _now_ms()
        self._stage.link.restore()
        self._screen.say("link restored")

    def _finish(self) -> None:
        """Everything sent is answered, and the node says that it has nothing left to send."""
        stage = self._stage
        self._phase = "closing"
        stage.plant.enter(QUIET)
        self._wait("every event taken by the broker", lambda: stage.plant.unacknowledged() == 0)
        # What the node has given up on will not be answered by waiting.
        self._wait("every event answered", lambda: stage.ledger.outstanding() <= len(stage.consumer.dead_letters()))
        since_ms = _now_ms()

        def drained() -> bool:
            queue = stage.consumer.queue
            return bool(queue and queue.timestamp_ms > since_ms and queue.inbox == queue.outbox == 0)

        self._wait("empty queues on the node", drained)
        status = stage.agent.stop()
        if status != 0:
            self._notes.append(f"edge-agent ended with status {status}")

    def _result(self) -> Result:
        stage = self._stage
        stage.consumer.close()
        cut_off = stage.ledger.decided_between(self._cut_ms, self._restored_ms)
        queue = stage.consumer.queue
        active = stage.consumer.active
        return Result(
            broker=stage.broker.title,
            seconds=time.monotonic() - self._began_s,
            totals=stage.ledger.totals(),
            decisions_during_outage=len(cut_off),
            delivered_after_outage=sum(r.at_ms >= self._restored_ms for r in cut_off),
            outage_s=(self._restored_ms - self._cut_ms) / 1000,
            dead_letters=max(len(stage.consumer.dead_letters()), queue.dead_letters if queue else 0),
            dropped=sum(n for reason, n in queue.dropped.items() if reason != _RECOGNISED) if queue else 0,
            recognised=queue.dropped.get(_RECOGNISED, 0) if queue else 0,
            active_version=active.version if active else None,
            updates=tuple(self._outcome(release, rev) for release, rev in self._orders),
            notes=tuple(self._notes),
        )

    def _outcome(self, release: Release, rev: int) -> UpdateOutcome:
        state, decided_in, error, detail = outcome_of(self._stage.consumer.history(rev))
        variant = release.variant
        return UpdateOutcome(
            release=variant.label,
            version=variant.version,
            story=variant.story,
            new_bytes=release.published.new_bytes,
            state=state,
            decided_in=decided_in,
            error=error,
            detail=detail,
        )

    def _scene(self) -> Scene:
        stage = self._stage
        status, active = stage.consumer.status, stage.consumer.active
        return Scene(
            phase=self._phase,
            elapsed_s=time.monotonic() - self._began_s,
            broker=stage.broker.title,
            link_up=stage.link.up,
            node=status.state if status else "unknown",
            model=active.version if active else "none",
            totals=stage.ledger.totals(),
            queue=stage.consumer.queue,
            updates=tuple((r.variant.label, _last_state(stage.consumer.history(rev))) for r, rev in self._orders),
            last=tuple(stage.consumer.last_decisions()),
        )

    def _history(self) -> History:
        return self._stage.consumer.history(self._orders[-1][1]) if self._orders else History()

    def _state(self) -> UpdateState | None:
        states = self._history().states
        return states[-1] if states else None

    def _update_ended(self) -> bool:
        return self._state() in _ENDS

    def _online(self) -> bool:
        status = self._stage.consumer.status
        return status is not None and status.state == "online"

    def _inbox(self) -> int:
        queue = self._stage.consumer.queue
        return queue.inbox if queue else 0


def _last_state(history: History) -> str:
    return history.states[-1] if history.states else "ordered"


def _now_ms() -> int:
    return int(time.time() * 1000)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM takes the way of Ctrl-C, so that no child outlives us."""

    def interrupt(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_json(options: DemoOptions, found: dict[str, Any]) -> None:
    if options.json_path:
        write_atomic(options.json_path.absolute(), (json.dumps(found, indent=2) + "\n").encode())


def _remove(directory: Path, *, keep: bool) -> None:
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)


def _show_logs(directory: Path) -> None:
    logs = sorted(directory.glob("*.log"))
    if not logs:
        # Nothing was started, so there is nothing to look at.
        _remove(directory, keep=False)
        return
    for log in logs:
        lines = log.read_text("utf-8", "replace").splitlines()[-15:]
        sys.stderr.write(f"--- {log}\n" + "".join(f"{line}\n" for line in lines))
    sys.stderr.write(f"Everything is kept in {directory}\n")
