"""A process that lives on a spool and prints what it was promised, so that its killer can check the promises."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import Accepted, OutboundMessage
from edge_agent.uplink.spool import Spool


def say(*words: object) -> None:
    print(*words, flush=True)


def main(path: str, first: str) -> None:
    spool = Spool(Path(path), SpoolSettings())
    say("open")
    number = int(first)
    while True:
        event_id = f"event-{number}"
        outcome = spool.accept("triage", event_id, b"{}", "normal", 1)
        say("accepted" if outcome is Accepted else "duplicate", event_id)
        if number % 3:
            event = spool.next_event()
            if event is not None:
                spool.complete(event.inbox_id, [OutboundMessage("out", event.event_id.encode())])
                say("answered", event.event_id)
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
