"""What `edge-deploy` can be told: the arguments of every command, with an example each."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.broker import parse_address

# argparse's own type of `add_subparsers` results is private.
_Commands = Any


def parser() -> argparse.ArgumentParser:
    """The whole command line; ``options.command`` names the command that was chosen."""
    top = argparse.ArgumentParser(
        prog="edge-deploy",
        description="Publish model releases and tell nodes which one to run.",
        epilog="example: edge-deploy demo --seconds 40",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _keys(_group(commands, "keys", "make the keys"))
    _registry(_group(commands, "registry", "make, refresh and serve a registry"))
    _release(_group(commands, "release", "publish and list releases"))
    _desired(_group(commands, "desired", "tell a node which release to run"))
    _fleet(_group(commands, "fleet", "see what the nodes say"))
    _demo(commands)
    return top


def _keys(commands: _Commands) -> None:
    init = _command(commands, "keys init", "make every key and the TUF root", "keys init ./keys")
    init.add_argument("directory", type=Path, help="new directory; private/ stays here, trust/ goes on devices")
    _json(init)


def _registry(commands: _Commands) -> None:
    init = _command(commands, "registry init", "create an empty registry", "registry init ./registry --keys ./keys")
    init.add_argument("directory", type=Path)
    _keys_option(init)
    _json(init)

    refresh = _command(
        commands,
        "registry refresh",
        "sign snapshot and timestamp afresh (from cron, at least daily: devices refuse an expired timestamp)",
        "registry refresh ./registry --keys ./keys",
    )
    refresh.add_argument("directory", type=Path)
    _keys_option(refresh)
    refresh.add_argument("--all", action="store_true", help="also targets and releases (needs their offline keys)")
    _json(refresh)

    serve = _command(
        commands,
        "registry serve",
        "serve a registry over HTTP, with byte ranges",
        "registry serve ./registry --bind 0.0.0.0 --port 8080",
    )
    serve.add_argument("directory", type=Path)
    serve.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=0, help="default: a free one, printed on stdout")
    serve.add_argument("--quiet", action="store_true", help="no access log on stderr")
    _json(serve)


def _release(commands: _Commands) -> None:
    publish = _command(
        commands,
        "release publish",
        "publish a bundle; doing it twice changes nothing",
        "release publish ./bundle --registry ./registry --keys ./keys --sign",
    )
    publish.add_argument("bundle", type=Path, help="bundle directory with manifest.json")
    _registry_option(publish)
    _keys_option(publish)
    publish.add_argument("--sign", action="store_true", help="sign the manifest now, with the publisher key of --keys")
    publish.add_argument(
        "--trusted-key", type=Path, action="append", default=[], metavar="PEM", help="a further accepted publisher key"
    )
    _json(publish)

    listing = _command(
        commands, "release list", "list what is published", "release list --registry ./registry --keys ./keys"
    )
    _registry_option(listing)
    _keys_option(listing)
    _json(listing)


def _desired(commands: _Commands) -> None:
    wanted = _command(
        commands,
        "desired set",
        "sign a desired state and leave it retained on the broker",
        "desired set --site plant1 --node press-gw --release triage/1.2.0/cpu-arm64 "
        "--registry ./registry --keys ./keys --broker broker.plant:1883",
    )
    wanted.add_argument("--site", required=True)
    wanted.add_argument("--node", required=True)
    wanted.add_argument(
        "--release", required=True, metavar="PATH", help="<name>/<version>/<target>, as `release list` says"
    )
    _registry_option(wanted)
    _keys_option(wanted)
    _broker_options(wanted)
    wanted.add_argument(
        "--rev", type=_rev, default=None, help="a number, or auto: one more than the node knows (default)"
    )
    wanted.add_argument("--not-after", type=_moment, default=None, metavar="TIME", help="ISO 8601; default: in 30 days")
    wanted.add_argument("--allow-downgrade", action="store_true", help="permit an older version than the one that runs")
    wanted.add_argument("--retry-bad", action="store_true", help="try a release again that failed on this node before")
    wanted.add_argument(
        "--probation-decisions", type=_positive_int, default=50, metavar="N", help="default: %(default)s"
    )
    wanted.add_argument("--probation-s", type=_positive_float, default=300.0, metavar="S", help="default: %(default)s")
    _json(wanted)


def _fleet(commands: _Commands) -> None:
    status = _command(commands, "fleet status", "one line a node", "fleet status --broker broker.plant:1883")
    _broker_options(status)
    status.add_argument("--site", help="only this site")
    status.add_argument("--node", help="only this node")
    _json(status)


def _demo(commands: _Commands) -> None:
    demo = _command(
        commands,
        "demo",
        "the whole path on this machine: events, outage, four updates",
        "demo --seconds 40 --json out.json",
    )
    demo.add_argument(
        "--seconds", type=_positive_float, default=30.0, help="length of the plant's day; default: %(default)s"
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    demo.add_argument("--plain", action="store_true", help="plain lines instead of a live view")
    demo.add_argument("--bundle", type=Path, metavar="DIR", help="bundle to derive v1..v4 from; default: the reference")
    demo.add_argument("--broker", choices=("auto", "mosquitto", "amqtt"), default="auto", help="default: %(default)s")
    demo.add_argument("--keep", action="store_true", help="keep the working directory with every log")


def _group(commands: _Commands, name: str, purpose: str) -> _Commands:
    group = commands.add_parser(name, help=purpose, description=purpose)
    return group.add_subparsers(required=True, metavar="COMMAND")


def _command(commands: _Commands, name: str, purpose: str, example: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name.rsplit(maxsplit=1)[-1], help=purpose, description=purpose, epilog=f"example: edge-deploy {example}"
    )
    made.set_defaults(command=name)
    return made


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _keys_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--keys", type=Path, required=True, metavar="DIR", help="what `keys init` made")


def _registry_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--registry", type=Path, required=True, metavar="DIR", help="what `registry init` made")


def _broker_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--broker", type=_address, required=True, metavar="HOST:PORT")
    command.add_argument("--username", help="default: anonymous")
    command.add_argument("--password-file", type=Path, metavar="FILE", help="its first line is the password")
    command.add_argument("--ca-file", type=Path, metavar="PEM", help="switches TLS on")
    command.add_argument("--protocol", choices=("auto", "5", "3.1.1"), default="auto", help="default: 5, then 3.1.1")


def _address(text: str) -> tuple[str, int]:
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rev(text: str) -> int | None:
    if text == "auto":
        return None
    return _positive_int(text)


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return value


def _moment(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an ISO 8601 time") from error
    return when if when.tzinfo else when.replace(tzinfo=UTC)
