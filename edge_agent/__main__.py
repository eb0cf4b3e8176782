"""The ``edge-agent`` command.

Data goes to stdout, talk to stderr. Exit status: 0 done, 1 failed, 2 wrong usage. Sub-commands import what they need
when they run, so that ``run`` never loads ONNX Runtime into the agent's own process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from edge_agent.contract.event import printable
from edge_agent.errors import EdgeError, from_os_error

# Set before anything could import onnxruntime, in this process or in a child: its wheels report usage by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_MAX_ROW = 2**63 - 1  # SQLite's integers end here
_EPILOG = """examples:
  edge-agent decide --bundle export/reference/bundle '{"machine":"press-4","code":"E217","text":"oil pressure low"}'
  edge-agent decide --bundle export/reference/bundle - < events.jsonl
  edge-agent run --config /etc/edge-agent/config.toml
  edge-agent run --config config.toml --mqtt.host broker.plant.example
  edge-agent doctor --config /etc/edge-agent/config.toml
  edge-agent dead-letters list --config /etc/edge-agent/config.toml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in {"run", "doctor", "dead-letters"}:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = _COMMANDS[options.command](options, rest)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except EdgeError as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Every command maps its own faults: what is left is the output. The interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that went away (head, a closed terminal) has seen enough.
        return 1 if isinstance(error, BrokenPipeError) else _failed(from_os_error(error, "writing the output"))
    return status


def _failed(error: EdgeError) -> int:
    print(f"edge-agent: {printable(str(error))}", file=sys.stderr)
    # Wrong settings are wrong usage: the unit does not start ten times what cannot start.
    return 2 if error.code == "settings.invalid" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="Turns factory events into schema-valid decisions on the device.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edge-agent {metadata.version('edge-agent')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    run = command("run", "run the daemon", "edge-agent run --config config.toml --mqtt.host broker")
    decide = command("decide", "decide one event, or JSON lines from stdin", "edge-agent decide --bundle DIR '{...}'")
    bench = command("bench", "measure a bundle on this machine", "edge-agent bench --bundle DIR --json bench.json")
    doctor = command("doctor", "check this machine and its configuration", "edge-agent doctor --config config.toml")
    dead = command("dead-letters", "list or retry events that could not be decided", "edge-agent dead-letters list")

    for sub in (run, doctor, dead):
        sub.add_argument("--config", type=Path, help="TOML file (default /etc/edge-agent/config.toml)")
    for sub in (decide, bench):
        sub.add_argument("--bundle", type=Path, required=True, help="bundle directory")
        sub.add_argument("--task", help="task name (default: the bundle's only task)")
        sub.add_argument(
            "--threads", type=_whole(0, 256), default=0, help="inference threads (default: half the cores, 1 to 4)"
        )
        sub.add_argument(
            "--trusted-key", type=Path, action="append", default=[], help="PEM of a bundle signer; repeatable"
        )
    decide.add_argument("event", nargs="?", default="-", help="one JSON event, or - for JSON lines on stdin")
    decide.add_argument("--deadline-s", type=_seconds, help="override the task's deadline")
    bench.add_argument("--events", type=Path, help="JSON lines of events (default: the task's golden examples)")
    bench.add_argument("--json", type=Path, help="also write the figures to this file")
    bench.add_argument("--seconds", type=_seconds, help="time budget of the measured part (default 10; a sweep: 60)")
    bench.add_argument(
        "--sweep-threads", action="store_true", help="print which thread count decides fastest here, and the table"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    dead.add_argument("action", choices=("list", "retry"))
    dead.add_argument("id", nargs="?", type=_whole(1, _MAX_ROW), help="retry: the dead letter's id")
    dead.add_argument("--limit", type=_whole(1, _MAX_ROW), default=50, help="list: how many, the newest first")
    dead.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    return parser


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return number

    read.__name__ = "whole number"  # argparse shows it: "invalid whole number value"
    return read


def _seconds(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds above 0")
    return number


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from edge_agent.agent import run_daemon
    from edge_agent.settings import load_settings

    return run_daemon(load_settings(options.config, rest))


def _decide(options: argparse.Namespace, _rest: list[str]) -> int:
    from edge_agent.commands import decide

    return decide(options)


def _bench(options: argparse.Namespace, _rest: list[str]) -> int:
    from edge_agent.commands import bench, sweep_threads

    figures = sweep_threads(options) if options.sweep_threads else bench(options)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        try:
            options.json.write_text(text + "\n")
        except OSError as error:
            raise from_os_error(error, f"writing {options.json}") from error
    return 0


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from edge_agent.doctor import doctor

    return doctor(options.config, rest, as_json=options.json)


def _dead_letters(options: argparse.Namespace, rest: list[str]) -> int:
    from edge_agent.commands import dead_letters

    return dead_letters(options, rest)


_COMMANDS = {"run": _run, "decide": _decide, "bench": _bench, "doctor": _doctor, "dead-letters": _dead_letters}

if __name__ == "__main__":
    sys.exit(main())
