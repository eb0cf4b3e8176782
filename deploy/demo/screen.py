"""What a person sees: a live panel on a terminal, plain lines elsewhere, and the closing table."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.demo.ledger import Totals
from deploy.demo.result import Result
from edge_agent.contract.messages import Decision, QueueTelemetry

_PLAIN_PERIOD_S = 2.0
_STATE_STYLES = {"committed": "green", "failed": "yellow", "rolled_back": "yellow"}


@dataclass(frozen=True)
class Scene:
    """One moment of the demo.

    Args:
        phase: where in the plant's day.
        elapsed_s: since the day began.
        broker: which one.
        link_up: whether the node is connected to it.
        node: online, draining, offline or unknown.
        model: version that serves, as last reported.
        totals: counts.
        queue: the node's queue depths, as last received.
        updates: release and its state, in order.
        last: newest decisions, oldest first.
    """

    phase: str
    elapsed_s: float
    broker: str
    link_up: bool
    node: str
    model: str
    totals: Totals
    queue: QueueTelemetry | None
    updates: tuple[tuple[str, str], ...]
    last: tuple[Decision, ...]


class Screen(Protocol):
    """Shows the demo."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def show(self, scene: Scene) -> None:
        """The present moment; may be skipped."""

    def close(self) -> None:
        """Give the terminal back."""


class PlainScreen:
    """Lines on stdout, few enough to read."""

    def __init__(self) -> None:
        self._due_s = 0.0
        self._before: tuple[object, ...] = ()

    def say(self, text: str) -> None:
        """Print at once."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def show(self, scene: Scene) -> None:
        """Print when something changed, or every two seconds."""
        now, turning = time.monotonic(), (scene.phase, scene.updates, scene.link_up)
        if turning == self._before and now < self._due_s:
            return
        self._before, self._due_s = turning, now + _PLAIN_PERIOD_S
        totals = scene.totals
        updates = " ".join(f"{release}:{state}" for release, state in scene.updates)
        self.say(
            f"{scene.elapsed_s:5.1f} s  {scene.phase:10} {'' if scene.link_up else 'LINK CUT '}"
            f"in {totals.events_in} out {totals.decisions_out} {_depths(scene.queue)}  model {scene.model}  {updates}"
        )

    def close(self) -> None:
        """Nothing to give back."""


class LiveScreen:
    """A panel that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def say(self, text: str) -> None:
        """Print above the panel."""
        self._live.console.print(text, markup=False, highlight=False)

    def show(self, scene: Scene) -> None:
        """Redraw."""
        self._live.update(_panel(scene), refresh=True)

    def close(self) -> None:
        """Remove the panel."""
        self._live.stop()


def make_screen(*, plain: bool) -> Screen:
    """A live screen on a terminal unless ``plain``."""
    console = Console()
    return PlainScreen() if plain or not console.is_terminal else LiveScreen(console)


def closing_table(result: Result) -> None:
    """Print the result on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    totals = result.totals
    numbers = Table(title="edge-agent demo", show_header=False, title_justify="left", min_width=60)
    numbers.add_column("what")
    numbers.add_column("value", justify="right")
    rows: list[tuple[str, object]] = [
        ("broker", result.broker),
        ("events in", totals.events_in),
        ("decisions out", totals.decisions_out),
        ("lost", totals.lost),
        ("duplicates", totals.duplicates),
        ("sent twice after the cut: to consumer / to node", f"{totals.redelivered} / {result.recognised}"),
        ("deciding, p50 / p95", f"{_ms(totals.p50_ms)} / {_ms(totals.p95_ms)}"),
        (
            "plant to consumer with flood and outage, p50 / p95",
            f"{_ms(totals.end_to_end_p50_ms)} / {_ms(totals.end_to_end_p95_ms)}",
        ),
        (f"decisions during the {result.outage_s:.1f} s outage", result.decisions_during_outage),
        ("of these delivered afterwards", result.delivered_after_outage),
        ("dead letters / dropped", f"{result.dead_letters} / {result.dropped}"),
    ]
    for what, value in rows:
        numbers.add_row(what, str(value))
    console.print(numbers)
    updates = Table(title="updates", title_justify="left")
    for column in ("release", "what it is", "new bytes", "ended", "decided in", "why"):
        updates.add_column(column, justify="right" if column == "new bytes" else "left")
    for update in result.updates:
        style = _STATE_STYLES.get(update.state or "", "red")
        updates.add_row(
            update.release,
            update.story,
            f"{update.new_bytes:,}",
            Text(update.state or "no answer", style=style),
            update.decided_in or "",
            update.error or "",
        )
    console.print(updates)
    for fault in result.broken():
        console.print(f"BROKEN  {fault}", style="bold red", markup=False)
    if not result.broken():
        console.print("Every promise was kept.", style="green")


def _panel(scene: Scene) -> Panel:
    totals = scene.totals
    head = Table.grid(padding=(0, 3))
    link = Text("up", style="green") if scene.link_up else Text("CUT", style="bold red")
    head.add_row("phase", Text(scene.phase, style="bold"), "events in", str(totals.events_in))
    head.add_row("node", scene.node, "decisions out", str(totals.decisions_out))
    head.add_row("link", link, "queues", _depths(scene.queue))
    head.add_row("model", scene.model, "p50 / p95", f"{_ms(totals.p50_ms)} / {_ms(totals.p95_ms)}")
    updates = Text("updates   ")
    for release, state in scene.updates:
        updates.append(f"{release} ")
        updates.append(f"{state}   ", style=_STATE_STYLES.get(state, "cyan"))
    last = Table.grid(padding=(0, 2))
    for decision in reversed(scene.last):
        answer = Text(_answer(decision), no_wrap=True, overflow="ellipsis")
        last.add_row(decision.event_id, decision.model.version, decision.route, answer)
    title = f"edge-agent demo, {scene.elapsed_s:.0f} s, {scene.broker}"
    return Panel(Group(head, Text(), updates, Text(), last), title=title, title_align="left")


def _answer(decision: Decision) -> str:
    words = (
        (name if value else f"no {name}") if isinstance(value, bool) else str(value)
        for name, value in decision.decision.items()
    )
    return ", ".join(words)


def _depths(queue: QueueTelemetry | None) -> str:
    return f"inbox {queue.inbox} outbox {queue.outbox}" if queue else "inbox - outbox -"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
