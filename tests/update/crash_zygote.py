"""A process that forks devices to be killed: everything is imported once, so a device costs milliseconds.

Protocol on stdin/stdout, one line each: the test writes ``<state_dir> <trust_dir> <registry_url> <envelope> <now>``,
the zygote answers with the child's process id; the child stops itself, so that a tracer can be attached before it runs,
and works until nothing is left to do. Then the zygote writes how it ended (``0``, or the number of the signal).
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import datetime
from pathlib import Path

# What the child needs is imported before the fork, tuf included.
import tuf.ngclient  # noqa: F401 - loaded once, before the forks

from edge_agent.settings import UpdateSettings
from edge_agent.update.updater import Updater
from tests.fakes.release_simulator import TARGET
from tests.fakes.update_ports import FakeClock, FakePorts
from tests.update.conftest import NODE, find_in_this_process


def device(state_dir: str, trust_dir: str, registry_url: str, envelope: str, now: str) -> None:
    """One life of a device: start, hear the order, work."""
    settings = UpdateSettings(registry_url=registry_url, trust_dir=Path(trust_dir), target=TARGET, reserve_disk_bytes=0)
    clock = FakeClock(datetime.fromisoformat(now))
    updater = Updater(settings, Path(state_dir), NODE, FakePorts(), clock=clock, find_release=find_in_this_process)
    updater.resume()
    updater.on_desired(Path(envelope).read_bytes())
    while updater.advance():
        pass


def main() -> None:
    """Fork a device per line."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.kill(os.getpid(), signal.SIGSTOP)
            device(*line.split())
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
