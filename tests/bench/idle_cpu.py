"""What an idle node costs: processor time of the agent and of its worker while nothing happens.

    python -m tests.bench.idle_cpu                  # 60 seconds, two worker threads
    python -m tests.bench.idle_cpu --seconds 20 --threads 4 --bundle DIR

A real daemon on a real broker (mosquitto), with a model that has answered events, is left alone. Prints, for each of
its threads that did anything, processor time as a share of one core and wakeups a second; exits 1 where all together
cost 0.5 % of a core or more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.brokers import mosquitto
from tests.fakes.daemon import DECISIONS, TOPICS, Daemon, install
from tests.fakes.mqtt_peer import Peer

ROOT = Path(__file__).resolve().parents[2]
SHARE_MAX = 0.005
# The update's last reports, the worker's end of spinning.
SETTLE_S = 3.0


@dataclass(frozen=True)
class Spent:
    """What a thread has used since its start.

    Args:
        cpu_s: processor time.
        wakeups: times that it began to run.
    """

    cpu_s: float
    wakeups: int


def main() -> int:
    """Run, print, judge; the exit status."""
    options = _parse()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        broker = mosquitto(folder)
        broker.start()
        daemon = Daemon(folder, broker.port, worker={"threads": options.threads}, telemetry={"period_s": 30.0})
        peer = Peer(broker.port, DECISIONS, f"{TOPICS.base}/#")
        try:
            daemon.start()
            install(daemon, options.bundle, peer, broker.port)
            worker = daemon.worker_pid()
            if worker is None:
                print("there is no worker", file=sys.stderr)
                return 1
            return _watch({"agent": daemon.pid, "worker": worker}, options.seconds)
        finally:
            peer.close()
            daemon.close()
            broker.stop()


def _watch(processes: dict[str, int], seconds: float) -> int:
    time.sleep(SETTLE_S)
    before = {name: dict(_threads(pid)) for name, pid in processes.items()}
    started_s = time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started_s
    total = 0.0
    for name, pid in processes.items():
        after = dict(_threads(pid))
        share = sum(_difference(before[name], after, thread).cpu_s for thread in after) / elapsed_s
        total += share
        print(f"{name}: {share:.3%} of a core, {len(after)} threads")
        for thread in sorted(after):
            spent = _difference(before[name], after, thread)
            if spent.wakeups:
                per_s = spent.wakeups / elapsed_s
                print(f"    {thread:<26} {spent.cpu_s / elapsed_s:.3%}  {per_s:.2f} wakeups a second")
    print(f"together: {total:.3%} of a core; below {SHARE_MAX:.1%} is wanted")
    return 0 if total < SHARE_MAX else 1


def _difference(before: dict[str, Spent], after: dict[str, Spent], thread: str) -> Spent:
    start = before.get(thread, Spent(0.0, 0))
    return Spent(after[thread].cpu_s - start.cpu_s, after[thread].wakeups - start.wakeups)


def _threads(pid: int) -> Iterator[tuple[str, Spent]]:
    """Every thread by name and id. The kernel counts nanoseconds; a tick of ``stat`` would be 0.02 % of a minute."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns, _, runs = (task / "schedstat").read_text().split()
        yield f"{(task / 'comm').read_text().strip()} {task.name}", Spent(int(cpu_ns) / 1e9, int(runs))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "export/reference/bundle")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2, help="of the worker: one alone could not spin")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
