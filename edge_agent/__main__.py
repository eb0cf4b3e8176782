"""The ``edge-agent`` command.

Data goes to stdout, talk to stderr. Exit status: 0 done, 1 failed, 2 wrong usage. Sub-commands import what they need
when they run, so that ``run`` never loads ONNX Runtime into the agent's own process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from edge_agent.errors import EdgeError

# Set before anything could import onnxruntime, in this process or in a child: its wheels report usage by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

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
        return _COMMANDS[options.command](options, rest)
    except EdgeError as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, a closed terminal) went away; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
        sub.add_argument("--threads", type=int, default=0, help="inference threads (default: half the cores, 1 to 4)")
        sub.add_argument(
            "--trusted-key", type=Path, action="append", default=[], help="PEM of a bundle signer; repeatable"
        )
    decide.add_argument("event", nargs="?", default="-", help="one JSON event, or - for JSON lines on stdin")
    decide.add_argument("--deadline-s", type=float, help="override the task's deadline")
    bench.add_argument("--events", type=Path, help="JSON lines of events (default: the task's golden examples)")
    bench.add_argument("--json", type=Path, help="also write the figures to this file")
    bench.add_argument("--seconds", type=float, default=10.0, help="time budget of the measured part")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    dead.add_argument("action", choices=("list", "retry"))
    dead.add_argument("id", nargs="?", type=int, help="retry: the dead letter's id")
    dead.add_argument("--limit", type=int, default=50)
    dead.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    return parser


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from edge_agent.agent import run_daemon
    from edge_agent.settings import load_settings

    return run_daemon(load_settings(options.config, rest))


def _decide(options: argparse.Namespace, _rest: list[str]) -> int:
    from edge_agent.commands import decide

    return decide(options)


def _bench(options: argparse.Namespace, _rest: list[str]) -> int:
    from edge_agent.commands import bench

    figures = bench(options)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
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
