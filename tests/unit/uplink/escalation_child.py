"""A process that escalates and settles without end, and prints what it was promised."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

from edge_agent.settings import SpoolSettings
from edge_agent.uplink.records import BudgetRow, NewEscalation, OutboundMessage
from edge_agent.uplink.spool import Spool


def say(*words: object) -> None:
    print(*words, flush=True)


def main(path: str) -> None:
    spool = Spool(Path(path), SpoolSettings())
    while True:
        event_id = uuid.uuid4().hex
        spool.accept("triage", event_id, b"{}", "normal", 1)
        say("accepted", event_id)
        event = spool.next_event()
        assert event is not None
        new = NewEscalation(event.event_id, "http", event.event_id.encode(), b"{}", "boot", 0, 1000)
        spool.escalations.begin(event.inbox_id, new, BudgetRow(1.0, "boot", 0), bounds=(1000, 1 << 20))
        say("begun", event.event_id)
        rows = spool.escalations.waiting()
        if len(rows) > 3:
            case = spool.escalations.case(rows[0].escalation_id)
            assert case is not None
            spool.escalations.settle(case.row.escalation_id, OutboundMessage("out", case.guess), "answered")
            say("settled", case.guess.decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
